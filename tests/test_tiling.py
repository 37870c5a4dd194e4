"""Tiles follow the size of the image that programs own: which they are, and that results do not depend on them."""

import itertools
import math

import pytest
import torch
from test_warp import check
from tri_stn.kernels import launch, tiling

import tri_stn
from tri_stn import kernels
from tri_stn.testing import Case

LAYOUTS = {"contiguous": (3, False), "channels_last": (64, True)}


def blocks_of(size, channels, channels_last):
    """What the three kernels take for an image of this size."""
    layout = size, channels, channels_last, torch.float32, 2
    return [
        tiling.gather_tile(*layout),
        tiling.scatter_tile(*layout, all_channels=False),
        tiling.walk_tile(*layout, folds=False),
    ]


def lanes_used(tile, size):
    return math.prod(size) / (tile.count(size) * math.prod(tile.block))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_never_more_programs_nor_fewer_lanes_in_use_than_in_a_tile_for_large_images(dims, layout):
    sides = (1, 2, 3, 5, 7, 8, 9, 14, 16, 28, 33, 56, 100, 224, 2**20)
    for size in itertools.product(sides, repeat=dims):
        large = blocks_of((2**20,) * dims, *layout)
        for tile, usual in zip(blocks_of(size, *layout), large, strict=True):
            pixels, threads = math.prod(tile.block), 32 * tile.num_warps
            assert pixels == 2 ** int(math.log2(pixels)) and 32 <= pixels <= math.prod(usual.block)
            assert threads == (128 if layout[1] else pixels)
            assert tile.count(size) <= usual.count(size) and lanes_used(tile, size) >= lanes_used(usual, size), size
            if all(n >= b for n, b in zip(reversed(size), usual.block, strict=True)):
                assert tile == usual, "an image that is no smaller takes the usual tile"


@pytest.mark.parametrize(
    "size,least",
    [((7, 7), 0.76), ((1, 2**20), 1), ((2**20, 1), 1), ((1, 64, 64), 1), ((64, 1, 64), 1), ((64,), 1), ((3, 64), 0.75)],
)
def test_small_images_use_most_of_the_lanes(size, least):
    for tile in blocks_of(size, *LAYOUTS["contiguous"]):
        assert lanes_used(tile, size) >= least, tile


def test_all_sizes_share_a_few_tiles_and_a_few_keys():
    """Each tile is a compilation, and each key takes a place in a cache."""
    tiling._block.cache_clear()
    sizes = list(itertools.product([*range(1, 70), 128, 1000, 1001, 2**20], repeat=2))
    tiles = {tiling.gather_tile(size, 3, False, torch.float32, 2) for size in sizes}
    assert len(tiles) <= 24
    assert tiling._block.cache_info().currsize <= 64


@pytest.mark.parametrize("per_program", [1, 64])
@pytest.mark.parametrize("most", [1, 4, 8])
def test_channels_fall_into_blocks_that_waste_few(most, per_program):
    """Every channel has one program; blocks are whole where channels can be shared out alike."""
    for channels in range(1, 300):
        tile = tiling._tile((64, 64), channels, False, torch.float32, 2, most, per_program, 255)
        assert tile.channels_per_program % tile.unroll == 0, "programs would share a block"
        blocks = -(-channels // tile.unroll)
        assert blocks == -(-channels // most) and blocks * tile.unroll - channels < blocks
        assert tile.whole == (channels % tile.unroll == 0)
    counts = {tiling._tile((64, 64), n, False, torch.float32, 2, most, per_program, 255) for n in range(1, 300)}
    assert len(counts) <= 4 * most, "each is a compilation"


SMALL = {
    "row": ((1, 150), (1, 9)),
    "column": ((150, 1), (9, 1)),
    "seven": ((7, 7), (7, 6)),
    "pixel": ((1, 1), (2, 1)),
    "line": ((40,), (33,)),
    "flat": ((1, 6, 7), (1, 5, 9)),
    "upright": ((7, 1, 6), (6, 1, 5)),
}
"""Output and input sizes, which the gather's and the scatter's, and the walk's tiles follow."""


@pytest.mark.parametrize("channels,arrangement", [(3, "contiguous"), (9, "channels_last")])
@pytest.mark.parametrize("kind,padding_mode", [("affine", "zeros"), ("affine", "border"), ("grid", "zeros")])
@pytest.mark.parametrize("size,input_size", SMALL.values(), ids=SMALL)
def test_small_images_match_torch(backend, size, input_size, kind, padding_mode, channels, arrangement):
    """Gather and walk; with border the scatter before it; of a grid the scatter alone."""
    case = Case(kind=kind, size=size, input_size=input_size, channels=channels, arrangement=arrangement)
    check(case.with_(padding_mode=padding_mode), backend)


@pytest.fixture
def larger_blocks(monkeypatch):
    """Those of 8 warps that bench/NOTES.md would try on a GPU."""
    monkeypatch.setitem(tiling._BLOCKS, 2, {1: (16, 16)})
    tiling._block.cache_clear()
    yield
    tiling._block.cache_clear()


@pytest.mark.parametrize("backend", ["kernels"], indirect=True)
@pytest.mark.parametrize("kind,padding_mode", [("affine", "border"), ("grid", "zeros")])
def test_blocks_of_eight_warps_match_torch(backend, larger_blocks, kind, padding_mode):
    case = Case(kind=kind, size=(19, 33), input_size=(18, 20), images=1, padding_mode=padding_mode)
    tile = tiling.scatter_tile(case.size, case.channels, False, case.dtype, taps=2, all_channels=False)
    assert (tile.block, tile.num_warps) == ((16, 16), 8)
    check(case, backend)


SIDE_BY_SIDE = [(n, "channels_last", torch.float32) for n in (3, 4, 8, 16, 20, 48, 96)]
SIDE_BY_SIDE += [(n, "channels_last", torch.bfloat16) for n in (16, 48, 64, 160)] + [
    (24, "channels_last", torch.float64)
]


@pytest.mark.parametrize("backend", ["kernels"], indirect=True)
@pytest.mark.parametrize(
    "channels,arrangement,dtype",
    [*((n, "contiguous", torch.float32) for n in (1, 2, 4, 5, 6, 7, 8, 11)), *SIDE_BY_SIDE],
)
@pytest.mark.parametrize("kind", ["affine", "grid"])
def test_any_number_of_channels(backend, kind, channels, arrangement, dtype):
    """Held at once and one after another, by one thread a pixel, by two and by four, in whole blocks or not."""
    sizes = {"size": (4, 5), "input_size": (5, 3), "images": 1}
    check(Case(kind=kind, channels=channels, arrangement=arrangement, dtype=dtype, **sizes), backend)


@pytest.mark.parametrize(
    "channels,dtype,expected",
    [
        (64, torch.float32, (16, 4, 32)), (96, torch.float32, (16, 3, 32)), (16, torch.float32, (16, 1, 32)),
        (64, torch.bfloat16, (32, 2, 32)), (16, torch.bfloat16, (16, 1, 64)), (8, torch.bfloat16, (8, 1, 32)),
        (64, torch.float64, (8, 2, 32)), (20, torch.float32, (16, 2, 32)), (6, torch.float32, (8, 1, 32)),
        (3, torch.float32, (1, 3, 128)), (4, torch.bfloat16, (1, 4, 128)),
    ],
)  # fmt: skip
def test_threads_share_a_pixel_by_two_sectors(channels, dtype, expected):
    """Of 16 bytes each, where Triton can tell that they are aligned: channels in a block, blocks, pixels."""
    tile = tiling.gather_tile((100, 100), channels, True, dtype, taps=2)
    assert (tile.block_c, tile.unroll, math.prod(tile.block)) == expected
    assert tile.num_warps == 4


@pytest.fixture
def several_tiles(monkeypatch):
    """Programs take as many tiles as those of a large batch; the kernels whose programs did."""
    monkeypatch.setattr(tiling, "_ENOUGH", 1)
    taken, call = set(), launch.Launch.__call__

    def watched(self, *pointers):
        if self.constants.get("TILES", 1) > 1 or self.constants.get("LOOP"):
            taken.add(self.kernel.__name__.removesuffix("_kernel") + " tangent" * self.constants["TANGENT"])
        call(self, *pointers)

    monkeypatch.setattr(launch.Launch, "__call__", watched)
    return taken


SEVERAL = {
    "zeros": (Case(size=(15, 57), input_size=(16, 60)), "gather walk"),
    "border": (Case(size=(19, 33), input_size=(20, 37), padding_mode="border", images=1), "gather scatter walk"),
    "maps": (Case(size=(9, 17), input_size=(9, 17), images=1, maps=3), "gather"),
    "channels_last": (
        Case(size=(9, 17), input_size=(10, 13), channels=9, arrangement="channels_last", images=1),
        "gather walk",
    ),
    "3-D": (Case(size=(5, 5, 9), input_size=(5, 5, 9), images=1, channels=1), "gather walk"),
    "1-D": (Case(size=(500,), input_size=(140,), images=1, channels=1, dtype=torch.float64), "gather walk"),
    "projective": (Case(kind="projective", size=(19, 33), input_size=(6, 5)), "gather scatter"),
    "grid": (Case(kind="grid", size=(19, 33), input_size=(6, 5)), "gather"),
    "degenerate": (
        Case(theta=((0.0, 0.0, 0.1), (0.3, 1.0, 0.02)), size=(9, 17), input_size=(9, 17), images=1),
        "gather walk",
    ),
}


@pytest.mark.parametrize("backend", ["kernels"], indirect=True)
@pytest.mark.parametrize("case,several", SEVERAL.values(), ids=SEVERAL)
def test_programs_that_take_several_tiles_match_torch(backend, several_tiles, case, several):
    check(case, backend)
    assert several_tiles == set(several.split())


OPTIONS = {
    "fill and mask": (Case(), {"fill": 0.5, "return_mask": True}),
    "supersample": (Case(), {"supersample": 2}),
    "supersample, projective": (Case(kind="projective"), {"supersample": 2}),
    "as many samples as it shrinks": (Case(theta=((1.6, 0.3, 0.1), (-0.2, 1.7, 0.02))), {"antialias": True}),
    "bicubic": (Case(mode="bicubic", padding_mode="reflection", channels=1), {}),
    "fp64, corners": (Case(dtype=torch.float64, align_corners=True, channels=1), {}),
    "projective": (Case(kind="projective", padding_mode="border"), {}),
    "volume": (Case(size=(3, 5, 9), input_size=(3, 5, 9), channels=1), {}),
    "projected": (Case(size=(2, 5, 17), input_size=(2, 5, 9), channels=1), {"project": "mean"}),
}


@pytest.mark.parametrize("backend", ["kernels"], indirect=True)
@pytest.mark.parametrize("case,options", OPTIONS.values(), ids=OPTIONS)
def test_several_tiles_change_nothing(backend, several_tiles, monkeypatch, case, options):
    """Two gradients and, where there are any, second ones: of what programs of one tile find, to its rounding."""
    if len(case.size) == 2:
        case = case.with_(size=(5, 17), input_size=(6, 18))
    image, parameters, grad = case.tensors(backend)
    grad = grad[:, :, 0] if "project" in options else grad
    twice = options.get("supersample", 1) == 1 and "antialias" not in options
    found = []
    for enough in (1, 2**13):
        monkeypatch.setattr(tiling, "_ENOUGH", enough)
        kernels.launch.forget()
        several_tiles.clear()
        inputs = [t.detach().requires_grad_() for t in (image, parameters, grad)]
        output = tri_stn.warp(inputs[0], case.transform(inputs[1]), case.size, **case.options, **options)
        output, *rest = output if isinstance(output, tuple) else (output,)
        gradients = torch.autograd.grad(output, inputs[:2], inputs[2], create_graph=True)
        if twice:
            rest += torch.autograd.grad(sum((g**2).sum() for g in gradients), inputs)
        found.append((set(several_tiles), output, *rest, *gradients))
    (several, *actual), (one, *expected) = found
    own = (
        {"scatter"}
        if case.kind == "projective"
        else {"walk"} | ({"scatter"} if case.padding_mode != "zeros" else set())
    )
    kernels_of = {"gather"} | own
    assert not one and several == kernels_of | ({f"{k} tangent" for k in kernels_of} if twice else set())
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5 * float(e.detach().abs().amax()))


def test_a_launch_has_programs_enough():
    """Programs of a large batch take 8 tiles each; those of a few images, one."""
    tile = tiling.gather_tile((1024, 1024), 3, False, torch.float32, taps=2)
    assert tile.for_images(64, 3, (1024, 1024)).tiles == 8
    assert tile.for_images(1, 3, (224, 224)).tiles == 1
    many = tiling.gather_tile((1024, 1024), 32, False, torch.float32, taps=2)
    assert many.for_images(64, 32, (1024, 1024)) == many, "blocks of channels are turns enough"
    for images in (1, 2, 3, 17, 64, 1000):
        several = tile.for_images(images, 3, (1024, 1024))
        programs = images * several.programs((1024, 1024))
        assert programs >= tiling._ENOUGH or several.tiles == 1
    for size in ((7, 7), (14, 14), (24, 48), (28, 28), (100, 3), (224, 224)):
        several = tile.for_images(10**6, 3, size)
        assert several.programs(size) * several.tiles <= 1.125 * tile.count(size), "turns without a tile"
