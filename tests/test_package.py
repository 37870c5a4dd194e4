"""What is public, what importing costs, and that every way of installing works from any folder."""

import ast
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import tri_stn

ROOT = Path(__file__).parent.parent


def python(code, cwd, *arguments, **kwargs):
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, **kwargs)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_public_names():
    transforms = ["Affine", "Attention", "Compose", "Displacement", "FreeForm", "Grid", "LinearBasis"]
    transforms += ["PiecewiseAffine", "Projective", "Similarity", "ThinPlateSpline", "Velocity"]
    builders = ["boxes", "compose", "crop_box", "from_pixel_matrix", "invert"]
    builders += ["rotation", "scaling", "shear", "to_pixel_matrix", "translation"]
    samplers = ["affine_grid", "fuse", "grid_sample", "register_transform", "splat", "warp"]
    assert tri_stn.__all__ == sorted(transforms + builders + samplers + ["nn"])
    assert all(getattr(tri_stn, name).__doc__ for name in tri_stn.__all__)


def test_import_is_light(tmp_path):
    """No Triton, no device work, until a GPU tensor asks for it."""
    code = "import sys, torch, tri_stn; print('triton' in sys.modules, torch.cuda.is_initialized())"
    before = python("import sys, torch; print('triton' in sys.modules)", tmp_path)
    assert python(code, tmp_path) == f"{before} False"


def test_cpu_needs_no_triton(tmp_path):
    code = """
import sys
sys.modules["triton"] = None
import torch, tri_stn
image = torch.rand(1, 1, 4, 4, requires_grad=True)
tri_stn.warp(image, tri_stn.Affine(torch.eye(2, 3)[None])).sum().backward()
print(image.grad.sum().item())
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    assert python(code, tmp_path, env=environment) == "16.0"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution, unpacked; built from a copy so that the tree stays clean."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for file in filter(os.path.isfile, (ROOT / name for name in listed.stdout.splitlines())):
        copy = source / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    with tarfile.open(build("sdist", source, out)) as archive:
        archive.extractall(out, filter="data")
    return next(path for path in out.iterdir() if path.is_dir())


def build(kind, source, out):
    code = f"import sys; from setuptools import build_meta as b; print(b.build_{kind}(sys.argv[1]))"
    built = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=source, check=True, capture_output=True, text=True
    )
    return out / built.stdout.splitlines()[-1]


USE = """
import sys
sys.path.insert(0, {folder!r})
import importlib.util, torch, tri_stn, tri_stn.kernels
assert all(module.__file__.startswith({folder!r}) for module in (tri_stn, tri_stn.kernels))
assert importlib.util.find_spec("kernels") is None
image = torch.rand(1, 1, 4, 4, requires_grad=True)
tri_stn.warp(image, tri_stn.Affine(torch.eye(2, 3)[None])).sum().backward()
print(image.grad.sum().item())
"""


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_wheel_from_the_sdist_works_anywhere(sdist, tmp_path, interpret):
    """On the CPU path and through the kernels."""
    folder = tmp_path / "site"
    zipfile.ZipFile(build("wheel", sdist, tmp_path)).extractall(folder)
    modules = {path.relative_to(ROOT) for path in (ROOT / "tri_stn").rglob("*.py")}
    assert all((folder / module).exists() for module in modules)  # each subpackage is in pyproject's list
    assert (folder / "tri_stn" / "py.typed").exists() and (sdist / "LICENSE").exists()
    code, environment = USE.format(folder=str(folder)), os.environ | {"TRITON_INTERPRET": interpret}
    assert python(code, tmp_path, env=environment) == "16.0"


def test_editable_install_maps_the_kernels():
    """This test runs on one, or on an installed copy: either way from a folder named kernels, or from the wheel."""
    code = "import tri_stn.kernels, pathlib; print(pathlib.Path(tri_stn.kernels.__file__).parent.name)"
    assert python(code, "/") == "kernels"


def test_readme_names_tests_that_exist():
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", (ROOT / "README.md").read_text())
    assert len(named) >= 20
    for file, name in named:
        functions = {n.name for n in ast.parse((ROOT / file).read_text()).body if isinstance(n, ast.FunctionDef)}
        assert name in functions, f"README.md names {file}::{name}, which does not exist"


def test_readmes_training_script_is_short_and_runs():
    """With a few steps of its thousand: the network has learned nothing yet."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (script,) = (block for block in blocks if "optimizer.step()" in block)
    assert len(script.splitlines()) <= 40 and "range(1000)" in script
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    assert "of the test digits are read right" in python(
        script.replace("range(1000)", "range(3)"), "/", env=environment
    )


def imports(file):
    """Names of the modules that a file imports, relative ones with their dots."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
            yield from ("." * node.level + alias.name for alias in node.names if not node.module)


@pytest.mark.parametrize(
    "files,forbidden",
    [
        ("kernels/*.py", ("tri_stn", "..", "bench", "tests")),
        ("tri_stn/reference.py", (".kernels", "tri_stn", "triton")),
        ("tri_stn/**/*.py", ("triton", "bench", "tests")),
    ],
)
def test_rooms_keep_to_themselves(files, forbidden):
    """Kernels never import the torch side, the reference never imports kernels."""
    for file in ROOT.glob(files):
        for name in imports(file):
            assert not name.startswith(forbidden), f"{file.name} imports {name}"
