"""A person's comparisons: what is accepted, what the file has afterwards, and what damages it cannot have."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from gptsmith.errors import UsageError
from gptsmith.log import JsonLines
from gptsmith.server.comparisons import check_file
from gptsmith.server.service import Settings

ASKED = [{"role": "user", "content": "a cat?"}]
BODY = {"model": "tiny", "prompt": ASKED, "completions": ["the mat", "a mat"], "choice": "left"}


def rows(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.split("\n")[:-1]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "preferences.jsonl"


@pytest.fixture
def site(start: Callable[..., Any], file: Path) -> Any:
    return start(Settings(collect=file))


@pytest.fixture
def http(site: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=site.url, timeout=60) as client:
        yield client


def test_choices_become_lines(http: httpx.Client, file: Path) -> None:
    options = {"temperature": 1.0, "top_p": 0.95, "stop": ["x"]}
    more = {"options": options, "seeds": [3, 4], "finish_reasons": ["stop", "length"]}
    for choice in ("left", "right", "tie", "both_bad"):
        answer = http.post("/api/comparisons", json=BODY | more | {"choice": choice})
        assert answer.status_code == 200, answer.text
    left, right, tie, bad = rows(file)
    for row in (left, right, tie, bad):
        assert row["prompt"] == ASKED
        assert (row["model"], row["edited"], row["options"]) == ("tiny", False, options)
        assert (row["seeds"], row["finish_reasons"]) == ([3, 4], ["stop", "length"])
        assert row["time"].endswith("+00:00")
    assert (left["choice"], left["chosen"], left["rejected"]) == ("left", "the mat", "a mat")
    assert (right["choice"], right["chosen"], right["rejected"]) == ("right", "a mat", "the mat")
    for row, choice in ((tie, "tie"), (bad, "both_bad")):
        assert (row["choice"], row["completions"]) == (choice, ["the mat", "a mat"])
        assert not {"chosen", "rejected"} & row.keys()
    counted = http.get("/api/comparisons").json()
    assert counted == answer.json()
    expected = {"comparisons": 4, "pairs": 2, "left": 1, "right": 1, "tie": 1, "both_bad": 1, "edited": 0}
    assert expected.items() <= counted.items()
    assert counted["file"] == "preferences.jsonl"


def test_two_models_are_recorded(http: httpx.Client, file: Path) -> None:
    answer = http.post("/api/comparisons", json=BODY | {"models": ["tiny", "plain"]})
    assert answer.status_code == 200, answer.text
    (row,) = rows(file)
    assert (row["model"], row["models"]) == ("tiny", ["tiny", "plain"])
    assert http.post("/api/comparisons", json=BODY | {"models": ["tiny", "none"]}).status_code == 404
    assert http.post("/api/comparisons", json=BODY | {"models": ["tiny"]}).status_code == 400
    assert len(rows(file)) == 1


def test_an_edited_answer_is_chosen_over_the_other_one(http: httpx.Client, file: Path) -> None:
    answer = http.post("/api/comparisons", json=BODY | {"choice": "right", "edited": "a mat, of course"})
    assert answer.json()["edited"] == 1
    http.post("/api/comparisons", json=BODY | {"edited": "the mat"})  # left as it was
    edited, unchanged = rows(file)
    assert edited["chosen"] == "a mat, of course"
    assert (edited["rejected"], edited["unedited"], edited["edited"]) == ("the mat", "a mat", True)
    assert (unchanged["chosen"], unchanged["edited"]) == ("the mat", False)
    assert "unedited" not in unchanged


def test_a_base_models_prompt_is_a_text(http: httpx.Client, file: Path) -> None:
    body = BODY | {"model": "plain", "prompt": "once  upon\n"}
    assert http.post("/api/comparisons", json=body).status_code == 200
    assert rows(file)[0]["prompt"] == "once  upon\n"


WRONG: list[tuple[dict[str, Any], int, str]] = [
    ({"choice": "both"}, 400, "choice"),
    ({"choice": None}, 400, "choice"),
    ({"completions": ["one"]}, 400, "completions"),
    ({"completions": ["one", "two", "three"]}, 400, "completions"),
    ({"completions": ["same", "same "]}, 400, "equals the rejected one"),
    ({"completions": [" ", "x"]}, 400, "chosen answer is empty"),
    ({"completions": ["x", ""]}, 400, "rejected answer is empty"),
    ({"edited": " \n"}, 400, "chosen answer is empty"),
    ({"edited": "a mat"}, 400, "equals the rejected one"),
    ({"edited": "x", "choice": "tie"}, 400, "set choice to left or right"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": [{"role": "user"}]}, 400, "content is missing"),
    ({"prompt": [{"role": "tool", "content": "x"}]}, 400, "role"),
    ({"prompt": [*ASKED, {"role": "assistant", "content": "x"}]}, 400, "must end with a message of the user"),
    ({"prompt": [{"role": "user", "content": "\ud83d"}]}, 400, "surrogate"),
    ({"options": {"temprature": 1}}, 400, "Did you mean 'temperature'"),
    ({"options": {"temperature": {"x": 1}}}, 400, "options"),
    ({"options": {"temperature": float("nan")}}, 400, "finite"),
    ({"seeds": [1]}, 400, "seeds"),
    ({"finish_reasons": ["stop", "tired"]}, 400, "finish_reasons"),
    ({"model": "absent"}, 404, "does not exist"),
    ({"comment": "x"}, 400, "not a known field"),
]


def test_what_is_no_comparison_is_refused_and_not_stored(http: httpx.Client, file: Path) -> None:
    for changes, status, message in WRONG:
        content = json.dumps(BODY | changes)
        answer = http.post("/api/comparisons", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == status, (changes, answer.text)
        assert message in answer.json()["error"]["message"], (changes, answer.text)
    for content in ("", "[]", "null", '{"model": "tiny"', json.dumps([BODY])):
        answer = http.post("/api/comparisons", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400, content
    # a form of another web page, which browsers send without asking
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        answer = http.post("/api/comparisons", content=json.dumps(BODY), headers={"content-type": kind})
        assert answer.status_code == 400
    assert not file.exists()


def test_keys_and_limits_hold(start: Callable[..., Any], file: Path) -> None:
    site = start(Settings(collect=file, keys=("sesame",), max_body=2000))
    url, key = f"{site.url}/api/comparisons", {"authorization": "Bearer sesame"}
    assert httpx.get(url).status_code == httpx.post(url, json=BODY).status_code == 401
    large = BODY | {"completions": ["x" * 2000, "y"]}
    assert httpx.post(url, json=large, headers=key).status_code == 413
    assert not file.exists()
    assert httpx.post(url, json=BODY, headers=key).status_code == 200
    assert httpx.get(url, headers=key).json()["comparisons"] == 1


def test_without_collect_nothing_is_stored(start: Callable[..., Any]) -> None:
    site = start(Settings())
    assert httpx.post(f"{site.url}/api/comparisons", json=BODY).status_code == 404
    assert 'data-views="chat playground inside"' in httpx.get(site.url).text


def test_many_at_once(http: httpx.Client, site: Any, file: Path) -> None:
    def choose(i: int) -> int:
        body = BODY | {"completions": [f"{i} " + "long " * 5000, "short"]}
        return httpx.post(f"{site.url}/api/comparisons", json=body, timeout=60).status_code

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(choose, range(40))) == {200}
    assert sorted(int(row["chosen"].split()[0]) for row in rows(file)) == list(range(40))
    assert http.get("/api/comparisons").json()["comparisons"] == 40


def append_many(path: Path, name: str) -> None:
    for i in range(60):
        JsonLines(path).append_durably({"name": name, "i": i, "text": name * 3000})


def test_processes_append_whole_lines(file: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=append_many, args=(file, name)) for name in "abc"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    found = rows(file)
    assert len(found) == 180
    for name in "abc":
        assert [row["i"] for row in found if row["name"] == name] == list(range(60))


def test_the_file_is_read_as_it_grows_and_changes(http: httpx.Client, file: Path) -> None:
    http.post("/api/comparisons", json=BODY)
    JsonLines(file).append_durably({"prompt": "x", "chosen": "y", "rejected": "z"})  # another program's
    with open(file, "ab") as other:
        other.write(b"not JSON\n[1]\n")
    counted = http.get("/api/comparisons").json()
    assert (counted["comparisons"], counted["pairs"], counted["unreadable"]) == (2, 2, 2)
    file.unlink()
    assert http.get("/api/comparisons").json()["comparisons"] == 0
    http.post("/api/comparisons", json=BODY)
    assert http.get("/api/comparisons").json()["comparisons"] == 1


@pytest.mark.parametrize("cut", [1, 5, 20, 100_000])
def test_a_torn_last_line_is_cut_off(http: httpx.Client, file: Path, cut: int) -> None:
    http.post("/api/comparisons", json=BODY)
    whole = file.read_bytes()
    torn = json.dumps({**json.loads(whole), "chosen": "x" * 200_000}).encode()
    file.write_bytes(whole + torn[:-cut])
    assert http.get("/api/comparisons").json()["comparisons"] == 1
    assert http.post("/api/comparisons", json=BODY | {"choice": "right"}).json()["comparisons"] == 2
    assert file.read_bytes().startswith(whole)
    assert [row["choice"] for row in rows(file)] == ["left", "right"]


def test_a_last_line_without_its_end_is_kept(http: httpx.Client, file: Path) -> None:
    http.post("/api/comparisons", json=BODY)
    file.write_bytes(file.read_bytes().rstrip(b"\n"))
    assert http.post("/api/comparisons", json=BODY | {"choice": "right"}).json()["comparisons"] == 2
    assert [row["choice"] for row in rows(file)] == ["left", "right"]


def test_a_full_disk_changes_nothing(http: httpx.Client, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    http.post("/api/comparisons", json=BODY)
    before = file.read_bytes()

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        answer = http.post("/api/comparisons", json=BODY)
    assert answer.status_code == 500
    assert "The choice was not saved: no space left on the disk" in answer.json()["error"]["message"]
    assert file.read_bytes() == before
    assert http.post("/api/comparisons", json=BODY).json()["comparisons"] == 2


LIMITED = """
import errno, pathlib, resource, signal, sys
from gptsmith.log import JsonLines
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    JsonLines(pathlib.Path(sys.argv[1])).append_durably({"i": 1, "text": "x" * 10_000})
except OSError as error:
    print(errno.errorcode[error.errno])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of resources")
def test_a_row_that_does_not_fit_leaves_the_file_as_it_was(file: Path) -> None:
    """A limit on the size of files stops the write in the middle of a line, as a full disk does."""
    JsonLines(file).append_durably({"i": 0})
    before = file.read_bytes()
    command = [sys.executable, "-c", LIMITED, str(file)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "EFBIG\n"
    assert file.read_bytes() == before


def test_the_file_is_checked_when_the_server_starts(tmp_path: Path, file: Path) -> None:
    check_file(tmp_path / "new.jsonl")
    assert (tmp_path / "new.jsonl").read_text() == ""
    with pytest.raises(UsageError, match="there is no folder"):
        check_file(tmp_path / "nodir" / file.name)
    assert not (tmp_path / "nodir").exists()
    file.write_text(json.dumps({"prompt": "x", "chosen": "y", "rejected": "z"}) + '\n{"prompt": "to')
    check_file(file)  # a torn line is repaired later
    for name, content, message in (
        ("notes.txt", "", "must end in .jsonl"),
        ("data.jsonl", '{"prompt": "x", "chosen": "y", "rejected": "z"}\n{"text": "x"}\n', "line 2: not a comparison"),
        ("list.jsonl", "[]\n", "line 1: not a comparison"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(UsageError, match=message):
            check_file(tmp_path / name)
    (tmp_path / "dir.jsonl").mkdir()
    with pytest.raises(UsageError, match="not a file"):
        check_file(tmp_path / "dir.jsonl")
    with pytest.raises(UsageError, match="cannot be written"):
        check_file(file / "below.jsonl")
