"""Every kernel once with every padding, layout and dtype, on tiny images: for a memory checker to watch.

    compute-sanitizer --tool memcheck python -m bench.smoke

Without a CUDA device the same calls run on the CPU.
"""

from __future__ import annotations

import itertools

import torch

import tri_stn


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    choices = itertools.product(
        ("zeros", "border", "reflection"), ("bilinear", "nearest"), (torch.contiguous_format, torch.channels_last),
        (torch.float32, torch.bfloat16), ((True, True), (True, False), (False, True)),
    )  # fmt: skip
    count = 0
    for padding_mode, mode, layout, dtype, (need_input, need_theta) in choices:
        generator = torch.Generator().manual_seed(count)
        # Odd sizes leave every tile's edge ragged; maps of scale 3 and shifts of 2 look far outside.
        image = torch.randn(2, 5, 13, 19, generator=generator).to(device, dtype)
        image = image.contiguous(memory_format=layout)
        theta = torch.randn(2, 2, 2, 3, generator=generator).mul_(torch.tensor([3.0, 1.0])[:, None, None]).to(device)
        image.requires_grad_(need_input)
        theta.requires_grad_(need_theta)
        output = tri_stn.warp(image, tri_stn.Affine(theta), (11, 17), mode=mode, padding_mode=padding_mode)
        output.sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()  # so that an error names the call that made it
        count += 1
    print(f"{count} combinations ran on {device}.")


if __name__ == "__main__":
    main()
