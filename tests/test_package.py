"""The wheel and the source distribution: what they hold, and that they work where there is no clone."""

import os
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest
from PIL import Image

import onefold
from onefold.training.run import load_run

pytest.importorskip("hatchling", reason="needs hatchling")

ROOT = Path(__file__).parent.parent


def call(*words: str | Path, where: Path, **environment: str) -> str:
    """The output of a command that nothing leads back to this clone."""
    apart = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    apart |= environment
    done = subprocess.run([str(word) for word in words], cwd=where, env=apart, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("source")
    call(sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", folder, where=ROOT)
    (packed,) = folder.glob(f"onefold-{onefold.__version__}.tar.gz")
    with tarfile.open(packed) as file:
        file.extractall(folder, filter="data")
    return folder / f"onefold-{onefold.__version__}"


def test_the_source_distribution_holds_the_repository(unpacked: Path):
    """Its tests, examples, documentation and checks."""
    if not (ROOT / ".git").exists():
        pytest.skip("is no clone")
    tracked = call("git", "ls-files", where=ROOT).splitlines()
    assert len(tracked) > 300
    assert [name for name in tracked if not (unpacked / name).exists()] == []


def test_it_is_tested_where_it_is_unpacked(unpacked: Path):
    words = (sys.executable, "-m", "pytest", "-q", "tests/test_house.py", "tests/test_docs_tables.py")
    assert "passed" in call(*words, where=unpacked, PYTHONPATH=str(unpacked / "src"))


def test_a_wheel_made_of_it_is_installed_and_works_outside_the_clone(unpacked: Path, tmp_path: Path):
    """In an environment of its own, which has torch and whatever else is needed from this one."""
    call(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", tmp_path, where=unpacked)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"onefold-{onefold.__version__}-py3-none-any.whl"
    venv.create(tmp_path / "venv", symlinks=True)
    bin = tmp_path / "venv" / "bin"
    packages = Path(
        call(bin / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", where=tmp_path).strip()
    )
    here = [path for path in sys.path if Path(path).name == "site-packages"]
    (packages / "needed.pth").write_text("\n".join(here) + "\n")
    pip = (sys.executable, "-m", "pip", "--python", bin / "python", "install", "-q", "--no-index", "--no-deps")
    call(*pip, "--ignore-installed", wheel, where=tmp_path)

    where = tmp_path / "elsewhere"
    where.mkdir()
    assert call(bin / "onefold", "--version", where=where) == f"onefold {onefold.__version__}\n"
    found = call(bin / "python", "-c", "import onefold; print(onefold.__file__)", where=where)
    assert Path(found.strip()).is_relative_to(packages)
    call(bin / "onefold", "sample", "digits", "-n", "4", "--out", "digits.png", where=where)
    with Image.open(where / "digits.png") as image:
        assert image.getextrema()[1] == 255
    words = (
        "digits",
        "--steps",
        "2",
        "--out",
        "run",
        "--training.batch",
        "16",
        "--training.precision",
        "float32",
        "--quiet",
    )
    call(bin / "onefold", "train", *words, where=where)
    assert load_run(where / "run").images == 32


def test_the_citation_is_of_this_version_and_of_both_papers():
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == onefold.__version__
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for paper in cited["references"]:
        assert paper["title"] in readme
        assert paper["journal"] in readme
