"""What GitHub and strangers read: workflows, policies, and addresses.

The bugs that this hunts: an action named by a tag, which its owner can move to other code; a job that may do more than
it needs, or never ends; an address of another repository; a policy that a file points to and that is not there; a
public name that the API page lacks.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pdrs

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
WITH_ADDRESSES = [ROOT / name for name in ("README.md", "SECURITY.md", "CITATION.cff", "pyproject.toml")]
WITH_ADDRESSES += sorted((ROOT / ".github").rglob("*.yml"))
POLICIES = [ROOT / "SECURITY.md", ROOT / "CONTRIBUTING.md"]


def jobs(workflow: Path) -> dict[str, str]:
    """Return the text of each job."""
    text = workflow.read_text(encoding="utf-8").partition("\njobs:\n")[2]
    parts = re.split(r"^  ([\w-]+):\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_named_by_commit_and_version(workflow: Path) -> None:
    used = re.findall(r"uses: (.*)", workflow.read_text(encoding="utf-8"))
    assert used
    for action in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action


def test_an_action_has_one_version() -> None:
    used = {action for path in WORKFLOWS for action in re.findall(r"uses: (.*)", path.read_text(encoding="utf-8"))}
    names = [action.partition("@")[0] for action in used]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_jobs_have_the_permissions_that_they_ask_for_and_an_end(workflow: Path) -> None:
    assert "\npermissions: {}\n" in workflow.read_text(encoding="utf-8")
    assert jobs(workflow)
    for name, text in jobs(workflow).items():
        assert re.search(r"^    timeout-minutes: \d+$", text, flags=re.MULTILINE), name
        (allowed,) = re.findall(r"^    permissions: \{(.*)\}", text, flags=re.MULTILINE)
        assert allowed == ("id-token: write" if name == "publish" else "contents: read"), name


def test_every_address_is_of_one_repository() -> None:
    found = set()
    for path in WITH_ADDRESSES:
        text = path.read_text(encoding="utf-8")
        found |= set(re.findall(r"https://(?:github|raw\.githubusercontent)\.com/([\w.-]*pdrs[\w.-]*/[\w.-]+)", text))
    assert found == {"pdrs-torch/pdrs"}


@pytest.mark.parametrize("policy", POLICIES, ids=lambda path: path.stem)
def test_policies_point_to_files_that_are_there(policy: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", policy.read_text(encoding="utf-8")):
        assert (ROOT / link).exists(), link


def test_the_api_page_has_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    documented = re.findall(r"^::: pdrs\.([\w.]+)$", text, flags=re.MULTILINE)
    modules = {"optim": pdrs.optim, "distributed": pdrs.distributed}
    names = [name for name in pdrs.__all__ if name not in modules]
    names += [f"{module}.{name}" for module in modules for name in modules[module].__all__]
    assert sorted(documented) == sorted(names)
