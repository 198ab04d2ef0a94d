"""The worktree of the deployments: the last commit, the project's cache and collection, and no change to what a person edits."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from flows_support import make_toy

from cm3leon.config.paths import EXCLUDED
from cm3leon.services import dvc_commands, worktree
from cm3leon.services.environment import child_path
from cm3leon.services.exclusive import BusyError, alone_in_directory
from cm3leon.services.worktree import WORKTREE, WorktreeError, prepare, project_of

IGNORED = ".cache/\n.prefect\n.services\n/models/\n/out/\n/data/source/*\n!/data/source/README.md\n"
SOURCE = Path("data/source")


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=me", "-c", "user.email=me@here", *arguments]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout


def dvc(root: Path, *arguments: str) -> str:
    environment = {**os.environ, "PATH": child_path()}
    return subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=root, env=environment, check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy project with a collection, of which git has the README only; committed, and the working directory."""
    make_toy(tmp_path)
    (tmp_path / ".gitignore").write_text(IGNORED)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"profile": "tiny", "ingest": {"path": str(SOURCE)}, "sft": {"steps": 20}}))
    (tmp_path / SOURCE).mkdir(parents=True)
    (tmp_path / SOURCE / "README.md").write_text("your images\n")
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--quiet", "-m", "toy")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_weights_that_parameters_name_are_there_although_git_does_not_have_them(toy: Path) -> None:
    weights = Path("weights/fid.pth")
    params = yaml.safe_load((toy / "params.yaml").read_text())
    (toy / "params.yaml").write_text(yaml.safe_dump({**params, "evaluate": {"inception": str(weights)}}))
    git(toy, "commit", "--quiet", "-m", "weights", "params.yaml")
    tree = prepare(toy)
    assert not (tree / weights).exists()  # nowhere: the run says so
    (toy / weights).parent.mkdir()
    (toy / weights).write_text("weights")
    for _ in range(2):
        assert (prepare(toy) / weights).read_text() == "weights"


def test_what_must_not_be_trained_on_is_there_as_long_as_it_is_in_the_project(toy: Path) -> None:
    listed = EXCLUDED / "benchmarks" / "captions.txt"
    (toy / listed).parent.mkdir(parents=True)
    (toy / listed).write_text("a dog")
    assert (prepare(toy) / listed).read_text() == "a dog"
    (toy / listed).unlink()
    assert not list((prepare(toy) / EXCLUDED).rglob("*.txt"))


def test_it_has_the_last_commit_and_leaves_the_project_alone(toy: Path) -> None:
    tree = prepare(toy)
    assert tree == toy / WORKTREE and project_of(tree) == toy and project_of(toy) is None
    (toy / "params.yaml").write_text("edited: by a person\n")
    (toy / "fault.txt").write_text("committed")
    git(toy, "commit", "--quiet", "-m", "fault", "fault.txt")
    (tree / "params.yaml").write_text("profile: small\n")  # as a run with a profile does
    prepare(toy)
    assert (tree / "fault.txt").read_text() == "committed"
    assert yaml.safe_load((tree / "params.yaml").read_text())["profile"] == "tiny"
    assert (toy / "params.yaml").read_text() == "edited: by a person\n"
    assert git(toy, "status", "--short") == " M params.yaml\n" and git(toy, "branch", "--list", "--format=%(refname)").count("\n") == 1
    assert dvc(tree, "cache", "dir").strip() == str(toy / ".dvc/cache")


def test_it_sees_the_collection_and_hides_that_from_git(toy: Path) -> None:
    (toy / SOURCE / "flowers").mkdir()
    (toy / SOURCE / "flowers" / "rose.png").write_bytes(b"rose")
    tree = prepare(toy)
    assert (tree / SOURCE / "flowers" / "rose.png").read_bytes() == b"rose"
    assert git(tree, "status", "--short", "--untracked-files=no") == ""
    (toy / SOURCE / "README.md").write_text("your photos\n")  # of the files in git that are hidden
    git(toy, "commit", "--quiet", "-m", "README", str(SOURCE / "README.md"))
    prepare(toy)
    assert git(tree, "show", f"HEAD:{SOURCE}/README.md") == (tree / SOURCE / "README.md").read_text() == "your photos\n"
    assert (tree / SOURCE / "flowers" / "rose.png").is_file() and git(toy, "status", "--short") == ""


def test_results_are_kept_as_experiments_and_taken_over(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (toy / SOURCE / "rose.png").write_bytes(b"rose")
    tree = prepare(toy)
    dvc(tree, "repro")
    monkeypatch.setattr(worktree, "RESULTS", 2)
    with monkeypatch.context() as patch:
        patch.chdir(tree)
        names = [worktree.save_results(f"tiny 2026-05-31 02:0{minute} 1a2b3c4d") for minute in range(3)]
    assert names[0] == "run-tiny-2026-05-31-02-00-1a2b3c4d"
    kept = git(toy, "for-each-ref", "--format=%(refname:lstrip=4)", "refs/exps/*/*/run-*").split()
    assert len(kept) == 2 and set(kept) <= set(names)
    head = git(toy, "rev-parse", "HEAD")
    dvc(toy, "exp", "apply", kept[0])
    assert (toy / "out/third").is_file() and (toy / SOURCE / "rose.png").read_bytes() == b"rose"
    assert git(toy, "rev-parse", "HEAD") == head and git(toy, "status", "--short") == "?? dvc.lock\n"


def test_it_has_the_cache_that_the_project_has(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    dvc(toy, "cache", "dir", "--local", str(tmp_path_factory.mktemp("shared")))
    dvc(toy, "repro")
    assert (prepare(toy) / "out/third").read_text() == "third"


def test_a_newer_run_in_the_project_is_taken_over_with_its_outputs(toy: Path) -> None:
    tree = prepare(toy)
    dvc(toy, "repro")
    prepare(toy)
    assert (tree / "dvc.lock").read_text() == (toy / "dvc.lock").read_text() and (tree / "out/third").read_text() == "third"
    ours = (tree / "dvc.lock").read_text() + "# of a later run here\n"
    (tree / "dvc.lock").write_text(ours)
    prepare(toy)
    assert (tree / "dvc.lock").read_text() == ours


def test_a_collection_that_moves_into_a_part_of_itself_keeps_its_files(toy: Path) -> None:
    params = yaml.safe_load((toy / "params.yaml").read_text())
    (toy / "photos/set1").mkdir(parents=True)
    (toy / "photos/set1/rose.png").write_bytes(b"rose")
    for place in ("photos", "photos/set1", "photos"):
        (toy / "params.yaml").write_text(yaml.safe_dump({**params, "ingest": {"path": place}}))
        git(toy, "commit", "--quiet", "-m", place, "params.yaml")
        tree = prepare(toy)
        assert (tree / "photos/set1/rose.png").read_bytes() == b"rose"
        assert (toy / "photos/set1/rose.png").read_bytes() == b"rose" and not (toy / "photos/set1").is_symlink()


def test_a_collection_beside_the_project_is_to_be_named_by_its_absolute_path(toy: Path) -> None:
    params = yaml.safe_load((toy / "params.yaml").read_text())
    photos = toy.with_name(f"{toy.name}-photos")
    photos.mkdir()
    (toy / "..photos").mkdir()
    for place in (f"../{photos.name}", str(photos), "..photos"):
        (toy / "params.yaml").write_text(yaml.safe_dump({**params, "ingest": {"path": place}}))
        git(toy, "commit", "--quiet", "-m", place, "params.yaml")
        if place.startswith("../"):
            with pytest.raises(WorktreeError, match=rf"ingest\.path {place} leads out of .* path in params\.yaml, {photos}"):
                prepare(toy)
        else:
            assert prepare(toy) == toy / WORKTREE


def test_a_link_in_the_project_may_lead_to_the_collection(toy: Path) -> None:
    params = yaml.safe_load((toy / "params.yaml").read_text())
    (toy / "params.yaml").write_text(yaml.safe_dump({**params, "ingest": {"path": "photos"}}))
    (toy / ".gitignore").write_text(f"{IGNORED}/photos\n")
    git(toy, "commit", "--quiet", "-m", "photos", "params.yaml", ".gitignore")
    elsewhere = toy.with_name(f"{toy.name}-elsewhere")
    elsewhere.mkdir()
    (elsewhere / "rose.png").write_bytes(b"rose")
    (toy / "photos").symlink_to(elsewhere)
    assert (prepare(toy) / "photos/rose.png").read_bytes() == b"rose"


@pytest.mark.parametrize("name", ["index.lock", "HEAD.lock"])
def test_why_git_fails_is_its_own_line(toy: Path, name: str) -> None:
    prepare(toy)
    lock = toy / ".git/worktrees/worktree" / name
    lock.touch()
    (toy / "fault.txt").write_text("changed")
    git(toy, "commit", "--quiet", "-m", "fault", "fault.txt")
    with pytest.raises(WorktreeError, match=rf"Unable to create '{lock}': File exists") as caught:
        prepare(toy)
    assert "git commit" not in str(caught.value)


def test_images_that_dvc_does_not_know_yet_survive_a_run_that_takes_over_outputs(toy: Path) -> None:
    params = yaml.safe_load((toy / "params.yaml").read_text())
    (toy / "params.yaml").write_text(yaml.safe_dump({**params, "ingest": {"path": "photos"}}))
    (toy / "photos").mkdir()
    (toy / "photos/rose.png").write_bytes(b"rose")
    dvc(toy, "add", "photos")
    git(toy, "add", "--all")
    git(toy, "commit", "--quiet", "-m", "photos")
    prepare(toy)
    (toy / "photos/tulip.png").write_bytes(b"tulip")
    dvc(toy, "repro", "dvc.yaml")
    tree = prepare(toy)
    assert (tree / "out/third").read_text() == "third" and (tree / "photos/tulip.png").read_bytes() == b"tulip"


def test_a_directory_that_is_no_worktree_does_not_let_git_reach_the_project(toy: Path) -> None:
    (toy / WORKTREE).mkdir(parents=True)
    (toy / WORKTREE / "kept").write_text("kept")
    (toy / "params.yaml").write_text("edited: true\n")
    tree = prepare(toy)
    assert (toy / "params.yaml").read_text() == "edited: true\n" and git(toy, "branch", "--show-current").strip()
    assert (tree / "dvc.yaml").is_file() and (toy / ".cache/worktree.damaged/kept").is_file()


@pytest.mark.parametrize("there_is_another", [False, True])
def test_a_project_that_was_moved_keeps_its_worktree_with_links_to_its_new_place(
    toy: Path, monkeypatch: pytest.MonkeyPatch, there_is_another: bool
) -> None:
    params = yaml.safe_load((toy / "params.yaml").read_text())
    (toy / "params.yaml").write_text(yaml.safe_dump({**params, "evaluate": {"inception": "weights/fid.pth"}}))
    git(toy, "commit", "--quiet", "-m", "weights", "params.yaml")
    excluded = EXCLUDED / "captions.txt"
    for file in (Path("weights/fid.pth"), SOURCE / "rose.png", excluded, Path(".prefect/server.json"), Path(".services/state.json")):
        (toy / file).parent.mkdir(parents=True, exist_ok=True)
        (toy / file).write_text("original")
    (prepare(toy) / "kept").write_text("kept")
    elsewhere = toy.rename(toy.with_name(f"{toy.name}-moved"))
    if there_is_another:  # a fresh clone, which has run deployments too
        git(elsewhere, "clone", "--quiet", str(elsewhere), str(toy))
        shutil.copytree(elsewhere, toy, ignore=shutil.ignore_patterns(".git", ".cache"), dirs_exist_ok=True)
        prepare(toy)
        git(elsewhere, "commit", "--quiet", "--allow-empty", "-m", "after the move")
    monkeypatch.chdir(elsewhere)
    for _ in range(2):
        tree = prepare(elsewhere)
        assert (tree / "kept").is_file()
        links = {link.relative_to(tree): link.readlink() for link in tree.rglob("*") if link.is_symlink()}
        names = (Path("weights/fid.pth"), SOURCE, excluded, *worktree.SHARED)
        assert links == {name: elsewhere / name for name in names}
        assert git(tree, "rev-parse", "HEAD") == git(elsewhere, "rev-parse", "HEAD")
    if there_is_another:
        assert git(toy / WORKTREE, "rev-parse", "HEAD") == git(toy, "rev-parse", "HEAD") != git(elsewhere, "rev-parse", "HEAD")
        assert git(toy / WORKTREE, "rev-parse", "--show-toplevel").strip() == str(toy / WORKTREE)


def test_a_lock_in_git_does_not_replace_that_of_the_last_run_there(toy: Path) -> None:
    dvc(toy, "repro")
    git(toy, "add", "dvc.lock")
    git(toy, "commit", "--quiet", "-m", "lock")
    tree = prepare(toy)
    assert (tree / "out/third").read_text() == "third"  # the project's run is taken over although git has its lock
    ours = (tree / "dvc.lock").read_text() + "# of a later run here\n"
    (tree / "dvc.lock").write_text(ours)
    prepare(toy)
    assert (tree / "dvc.lock").read_text() == ours


def test_while_a_run_works_there_nothing_changes_and_nothing_is_collected(toy: Path) -> None:
    tree = prepare(toy)
    with alone_in_directory(tree):
        (tree / "params.yaml").write_text("of the run\n")
        assert prepare(toy) == tree
        assert (tree / "params.yaml").read_text() == "of the run\n"
        with pytest.raises(BusyError, match=f"another run works in {tree}"), worktree.held(toy):
            pass


def test_objects_of_the_last_run_are_not_collected(toy: Path) -> None:
    tree = prepare(toy)
    dvc(tree, "repro")
    with worktree.held(toy) as locks:
        assert dvc_commands.remove_unused(locks, dry_run=False) == 0
    assert dvc_commands.remove_unused([], dry_run=True) > 0


def prepared(root: Path) -> subprocess.CompletedProcess[str]:
    """The first command of a deployment's run."""
    return subprocess.run([sys.executable, "-m", "cm3leon.services.worktree"], cwd=root, capture_output=True, text=True, check=False)


def test_without_git_runs_work_in_the_project(tmp_path: Path) -> None:
    done = prepared(tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}\n")
    assert "this directory is no git repository: this run works in the project itself" in done.stderr


def test_without_a_commit_it_is_refused_in_one_line(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    done = prepared(tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "HEAD" in done.stderr and "runs of deployments take the project's last commit, so it must be in git: git commit" in done.stderr
