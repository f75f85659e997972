"""The workshop: what `./run` decides, and that the files it reads agree with each other."""

import importlib.machinery
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent


def load_run():
    loader = importlib.machinery.SourceFileLoader("weft_run", str(ROOT / "run"))
    spec = importlib.util.spec_from_loader("weft_run", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


run = load_run()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
PINS = dict(
    line.split("==") for line in CONSTRAINTS.splitlines() if line and not line.startswith("#")
)


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def tracked_files() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout: what is committed cannot be known")
    names = listing.stdout.decode().split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


# --- which Python ---


@pytest.mark.parametrize("version", [(3, 11), (3, 12), (3, 13)])
def test_a_supported_python_is_used_as_it_is(version):
    assert run.choose_python(version, "/this/python", iter(["/other"])) == "/this/python"


@pytest.mark.parametrize("version", [(3, 10), (3, 14)])
def test_another_python_on_path_steps_in(version):
    assert run.choose_python(version, "/this/python", iter(["/first", "/second"])) == "/first"


def test_python_3_10_alone_is_refused_with_what_to_do():
    with pytest.raises(
        run.Refusal, match=r"needs Python 3\.11, 3\.12 or 3\.13; this is 3\.10"
    ) as e:
        run.choose_python((3, 10), "/this/python", iter([]))
    assert "Install one" in str(e.value)


def test_run_and_pyproject_support_the_same_pythons():
    allowed = SpecifierSet(PROJECT["requires-python"])
    assert [v for v in range(5, 25) if f"3.{v}" in allowed] == [v for _, v in run.SUPPORTED]


# --- which torch ---


def test_every_torch_plan_first_looks_for_a_cpu_wheel_without_an_index():
    for system in ("Linux", "Darwin", "Windows"):
        for has_gpu in (True, False):
            first = run.torch_plan("2.13.0", system, has_gpu)[0]
            assert {"--no-index", "--no-deps", "torch==2.13.0+cpu"} == set(first)


def test_linux_without_a_gpu_only_ever_takes_the_cpu_build():
    plan = run.torch_plan("2.13.0", "Linux", False)
    assert all(step[-1] == "torch==2.13.0+cpu" for step in plan)
    assert plan[1][plan[1].index("--index-url") + 1] == run.TORCH_CPU_INDEX


@pytest.mark.parametrize(
    ("system", "has_gpu"),
    [("Linux", True), ("Darwin", False), ("Windows", False), ("Windows", True)],
)
def test_a_gpu_or_another_system_takes_the_plain_build(system, has_gpu):
    assert run.torch_plan("2.13.0", system, has_gpu)[1:] == [["--no-deps", "torch==2.13.0"]]


def test_the_torch_version_is_read_from_the_constraints():
    assert run.pinned("torch", CONSTRAINTS) == PINS["torch"] == "2.13.0"
    with pytest.raises(run.Refusal, match="torch=="):
        run.pinned("torch", "torchvision==1.0\n")


# --- when to install again ---


def test_the_fingerprint_follows_the_requirements_and_the_place(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pyproject.toml").write_text("[project]")
        (tmp_path / name / "constraints.txt").write_text("torch==2.13.0")
    first = run.fingerprint(tmp_path / "a")
    assert first == run.fingerprint(tmp_path / "a")
    assert first != run.fingerprint(tmp_path / "b")
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / "a" / name).write_text("changed")
        assert first != (first := run.fingerprint(tmp_path / "a"))


def test_uv_hears_of_the_wheel_folder_only_if_it_exists(tmp_path):
    assert run.uv_environment({"PIP_FIND_LINKS": str(tmp_path)})["UV_FIND_LINKS"] == str(tmp_path)
    for env in (
        {},
        {"PIP_FIND_LINKS": str(tmp_path / "missing")},
        {"PIP_FIND_LINKS": str(tmp_path), "UV_FIND_LINKS": "mine"},
    ):
        assert run.uv_environment(env) == env


# --- the commands ---


def test_arguments_are_passed_on():
    assert run.command_plan("test", []) == [[run.PYTHON, "-m", "pytest", *run.SIDE_BY_SIDE]]
    assert run.command_plan("test", ["-k", "x"]) == [[run.PYTHON, "-m", "pytest", "-k", "x"]]
    assert run.command_plan("bench", ["a"]) == [[run.PYTHON, "-m", "benchmarks", "a"]]
    assert run.command_plan("conformance", []) == [[run.PYTHON, "-m", "tests.conformance"]]
    assert run.command_plan("python", ["-V"]) == [[run.PYTHON, "-V"]]
    assert run.command_plan("demo", [])[0][1:] == ["demo"]


def test_an_unknown_command_is_refused_before_anything_is_installed():
    done = subprocess.run(
        [sys.executable, str(ROOT / "run"), "tset"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "no command 'tset'" in done.stderr


def test_help_shows_every_command():
    done = subprocess.run([sys.executable, str(ROOT / "run")], capture_output=True, text=True)
    assert done.returncode == 0
    for name in ("demo", "test", "bench", "conformance", "lint", "python", "help"):
        assert f"./run {name}" in done.stdout
        if name != "help":
            assert run.command_plan(name, [])


@pytest.mark.skipif(sys.platform == "win32", reason="uses true and false")
def test_all_of_lint_runs_and_the_first_failure_is_the_exit_code(tmp_path):
    fail = [sys.executable, "-c", "raise SystemExit(3)"]
    touch = [sys.executable, "-c", f"open({str(tmp_path / 'ran')!r}, 'w').close()"]
    assert run.start([fail, touch]) == 3
    assert (tmp_path / "ran").exists()
    assert run.start([touch, touch]) == 0


# --- the files agree ---


def test_every_dependency_is_pinned_and_the_pin_is_allowed():
    pins = {normalized(name): version for name, version in PINS.items()}
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *(need for needs in extras.values() for need in needs)]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pins[normalized(requirement.name)]), requirement


def test_what_run_installs_are_extras():
    assert set(run.EXTRAS.split(",")) <= set(PROJECT["optional-dependencies"])


def test_constraints_are_exact_and_name_no_place():
    for line in CONSTRAINTS.splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][\w.]*", line), line


def test_no_committed_file_names_a_package_registry():
    hosts = [
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("registry.npmjs", "org"),
        ("registry.yarnpkg", "com"),
        ("conda.anaconda", "org"),
        ("proxy.golang", "org"),
        ("crates", "io"),
    ]
    pattern = re.compile("|".join(re.escape(".".join(host)) for host in hosts).encode())
    assert [path.name for path in tracked_files() if pattern.search(path.read_bytes())] == []


def test_the_wheel_holds_the_type_marker_and_the_tiny_model():
    """The build takes all of the package's folder except what git ignores."""
    assert PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["src/weft"]
    assert (ROOT / "src/weft/py.typed").is_file()
    tracked_files()
    for name in ("py.typed", "testing/tiny/model.safetensors", "testing/tiny/config.json"):
        ignored = subprocess.run(["git", "check-ignore", "-q", f"src/weft/{name}"], cwd=ROOT)
        assert ignored.returncode == 1, name
