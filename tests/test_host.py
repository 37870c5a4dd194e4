"""A launch that is remembered is the one that Triton would choose, and Triton is not asked twice."""

import os
import subprocess
import sys
from pathlib import Path

import torch

import tri_stn


def test_remembered_launches():
    """Below, in a process of its own: Triton without its interpreter, and without advice about its defaults."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    subprocess.run([sys.executable, "-W", "ignore", "-W", "error:TRITON_", __file__], env=environment, check=True)


def main():
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from bench import host

    asked, run = [], JITFunction.run
    JITFunction.run = lambda self, *args, **kwargs: (asked.append(self.__name__), run(self, *args, **kwargs))[1]

    def launches(call):
        """What is started, and which kernels Triton is asked for."""
        started.clear()
        asked.clear()
        call()
        return [(kernel, grid, shown(arguments)) for kernel, grid, arguments in started], list(asked)

    with host.nothing_runs() as started:
        for name, forward in (host.steps() | more_steps()).items():
            tri_stn.ops.kernels().launch.forget()
            first, asked_first = launches(lambda: host.both(forward))  # noqa: B023
            assert len(first) == len(asked_first) > 1, name
            assert launches(lambda: host.both(forward)) == (first, []), name  # noqa: B023

        # The same layouts elsewhere in memory, or on another device.
        memory, theta = torch.rand(8 * 28 * 28 + 1), torch.eye(2, 3).repeat(8, 1, 1)

        def at(start):
            image = memory[start:][: 8 * 28 * 28].view(8, 1, 28, 28)
            return lambda: tri_stn.warp(image, tri_stn.Affine(theta))

        aligned, _ = launches(at(0))
        unaligned, asked_off = launches(at(1))
        assert len(asked_off) == 1 and unaligned[0][0] is not aligned[0][0]
        assert launches(at(1)) == (unaligned, []) and launches(at(0)) == (aligned, [])
        driver.active.arch = "sm_80"
        elsewhere, asked_there = launches(at(0))
        assert len(asked_there) == 1 and elsewhere[0][0] is not aligned[0][0]


def more_steps():
    """Beside those of the benchmark: tensors of every kind that a launch may take."""
    image, field = torch.rand(1, 3, 8, 8, requires_grad=True), torch.zeros(1, 8, 8, 2, requires_grad=True)
    points = torch.rand(5, 2)
    chain = tri_stn.Compose(tri_stn.ThinPlateSpline(points, points[None] + 0.1), tri_stn.Displacement(field))
    return {
        "chain with a field": lambda: (tri_stn.warp(image, chain), [image, field]),
        "fill": lambda: (tri_stn.warp(image, tri_stn.Displacement(field), fill=0.5), [image, field]),
        "mask": lambda: (tri_stn.warp(image, chain, return_mask=True)[0], [image, field]),
        "16 bits": lambda: (tri_stn.warp(image.bfloat16(), chain), [image, field]),
    }


def shown(value):
    """Arguments in a form that compares; of a tensor, what a launch depends on."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.data_ptr() % 16 == 0
    return tuple(map(shown, value)) if isinstance(value, (tuple, list)) else value


if __name__ == "__main__":
    main()
