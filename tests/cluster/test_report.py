import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import cluster.report
from cluster.report import config_blocks, read_steps, summary_rows, timing_rows, write_report
from protocols.errors import BadInput

HOSTILE = "</script><img src=x onerror=alert(1)>&amp;<!--"


class Page(HTMLParser):
    """What a browser sees: the tags with their attributes, the visible text, and the scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.inside = ""
        self.feed(self.html)
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style", "svg"):
            self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == self.inside:
            self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif not self.inside:
            self.text += f" {data} "

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    @property
    def samples(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self.scripts[0])
        return rows


def lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of three steps beside the untrained base."""
    directory = tmp_path / "ledger-0"
    directory.mkdir()
    (directory / "config.yaml").write_text("method: spell\nsteps: 4\npolicy: {model: tiny}\n")
    lines(
        directory / "metrics.jsonl",
        [
            {"step": 0, "eval/gold": 0.61},
            {"step": 1, "reward/questioner": 0.3, "reward/responder": 0.55, "train/tokens": 812},
            {"step": 2, "reward/questioner": 0.4, "reward/responder": 0.65, "train/tokens": 913},
            {"step": 3, "reward/questioner": 0.5, "reward/responder": 0.75, "eval/gold": 0.71},
        ],
    )
    lines(directory / "timings.jsonl", [{"step": i, "seconds": float(i), "tokens_per_s": 99} for i in (1, 2, 3)])
    lines(directory / "samples.jsonl", [sample(1, "a"), sample(2, "b", output=HOSTILE)])
    return directory


def sample(step: int, uid: str, role: str = "responder", **fields: object) -> dict[str, object]:
    return {"step": step, "role": role, "uid": uid, "input": "What?", "output": "2,111", **fields}


def test_a_page_of_its_own(run_dir: Path) -> None:
    path = write_report(run_dir)
    page = Page(path)
    assert path == run_dir / "report.html"
    assert [file.name for file in run_dir.iterdir() if "report" in file.name] == ["report.html"]
    assert "spell ledger-0" in page.text
    assert "3 of 4 steps" in page.text
    assert page.count("svg") == 5  # eval, reward, train/tokens, seconds, tokens_per_s
    assert "questioner 0.300 → 0.500" in page.text
    assert "eval/gold 0.610 → 0.710" in page.text
    assert "seconds 2 1 3 6" in page.text
    assert "policy model tiny" in page.text
    assert "All 2 samples of 2 steps." in page.text
    # Nothing is loaded from elsewhere.
    assert not re.search(r"https?:|url\(|@import", page.html)
    assert not [attrs for _, attrs in page.tags if "src" in attrs or (attrs.get("href") or "#")[0] != "#"]


def test_the_page_is_the_same_each_time(run_dir: Path) -> None:
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first


def test_texts_of_models_stay_texts(run_dir: Path) -> None:
    lines(run_dir / "samples.jsonl", [sample(1, HOSTILE, task=HOSTILE, status=HOSTILE, output=HOSTILE)])
    lines(run_dir / "metrics.jsonl", [{"step": 1, f"{HOSTILE}/{HOSTILE}": 1.0, HOSTILE: math.nan}])
    lines(run_dir / "timings.jsonl", [{"step": 1, HOSTILE: 1.0}])
    (run_dir / "config.yaml").write_text(json.dumps({"method": HOSTILE, HOSTILE: {HOSTILE: HOSTILE}}))
    row = {"name": HOSTILE, "before": HOSTILE, "after": HOSTILE, "note": HOSTILE}
    (run_dir / "summary.json").write_text(json.dumps({"title": HOSTILE, "rows": [row], "notes": [HOSTILE]}))
    (run_dir / "panels.json").write_text(json.dumps({HOSTILE: [HOSTILE, "missing" + HOSTILE]}))
    page = Page(write_report(run_dir))
    assert (page.count("img"), page.count("script")) == (0, 2)
    assert page.samples[0]["output"] == HOSTILE
    assert page.html.count("<!--") == 0


def test_tokens_with_values_reach_the_page_as_data(run_dir: Path) -> None:
    reply: dict[str, Any] = {
        "tokens": [HOSTILE, "\u2028", " 2,111\n"],
        "values": [-1, None, 3],
        "marks": [True, False, None],
    }
    broken: dict[str, Any] = {"tokens": ["a"], "values": [math.nan]}
    rows = [sample(1, "a", marks_name=HOSTILE, **reply), sample(1, "b", **broken)]
    lines(run_dir / "samples.jsonl", rows)
    page = Page(write_report(run_dir))
    assert (page.count("img"), page.count("script"), page.html.count("<!--")) == (0, 2, 0)
    assert page.samples[0] == {**rows[0], "middle": 1.0, "scale": 2.0}
    assert page.samples[1] == {**rows[1], "tokens": '["a"]', "values": "[NaN]"}


def test_the_browser_runs_the_pages_own_script_only(run_dir: Path) -> None:
    page = Page(write_report(run_dir))
    policy = next(attrs["content"] for tag, attrs in page.tags if tag == "meta" and "http-equiv" in attrs)
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert policy is not None
    assert f"script-src 'sha256-{digest}'" in policy
    assert "innerHTML" not in page.html


def test_a_run_without_steps(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path))
    assert "No step is committed yet" in page.text
    assert page.count("svg") == page.count("script") == 0
    (tmp_path / "config.yaml").write_text("method: spell\nsteps: 40\n")
    for name in ("metrics.jsonl", "timings.jsonl", "samples.jsonl"):
        (tmp_path / name).touch()
    assert "No step is committed yet (of 40)." in Page(write_report(tmp_path)).text


def test_a_run_of_one_step(run_dir: Path) -> None:
    lines(run_dir / "metrics.jsonl", [{"step": 0, "eval/gold": 0.61}])
    page = Page(write_report(run_dir))
    assert "0 of 4 steps" in page.text
    assert "eval/gold 0.610" in page.text


def test_a_directory_is_needed(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="existing directory"):
        write_report(tmp_path / "nothing")


def test_a_killed_writer_is_named_and_costs_its_line_only(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "eval/go')
    with (run_dir / "samples.jsonl").open("a") as file:
        file.write('{"step": 4, "outp')
    page = Page(write_report(run_dir))
    assert "metrics.jsonl: line 5 left out as unreadable; a killed writer leaves" in page.text
    assert "samples.jsonl: 1 unreadable line(s) left out" in page.text
    assert "3 of 4 steps" in page.text
    assert len(page.samples) == 2


@pytest.mark.parametrize("line", ["[]", "7", '{"reward": 1}', '{"step": null}', '{"step": 1e999}', "\ufffd"])
def test_a_line_that_is_no_step_is_left_out(tmp_path: Path, line: str) -> None:
    path, warnings = tmp_path / "metrics.jsonl", list[str]()
    path.write_text(f'{{"step": 1, "reward": 0.5}}\n{line}\n\n{{"step": 2, "reward": null, "flag": true}}\n')
    assert read_steps(path, warnings) == {1: {"reward": 0.5}, 2: {}}
    assert warnings == ["metrics.jsonl: line 2 left out as unreadable"]


def test_of_a_step_that_was_timed_twice_the_later_time_counts(tmp_path: Path) -> None:
    lines(tmp_path / "timings.jsonl", [{"step": 1, "seconds": 9, "old": 1}, {"step": 1, "seconds": 2}])
    assert read_steps(tmp_path / "timings.jsonl", []) == {1: {"seconds": 2.0}}


@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "panels.json"])
@pytest.mark.parametrize("content", ["{", "[1]", "7"])
def test_a_broken_file_beside_the_run_is_a_warning(run_dir: Path, name: str, content: str) -> None:
    (run_dir / name).write_text(content)
    assert f"{name}: " in Page(write_report(run_dir)).text


def test_values_that_are_not_finite_are_named_and_left_open(run_dir: Path) -> None:
    values = [0.5, math.nan, 0.7, math.inf, 0.9]
    lines(run_dir / "metrics.jsonl", [{"step": i, "loss": value} for i, value in enumerate(values)])
    page = Page(write_report(run_dir))
    assert "loss is NaN or infinite at 2 steps (1, 3)" in page.text
    assert "nan" not in "".join(re.findall(r"<svg.*?</svg>", page.html, flags=re.DOTALL))


def test_a_diverged_run_does_not_flood_the_page(run_dir: Path) -> None:
    lines(run_dir / "metrics.jsonl", [{"step": 1, **{f"m{i}": math.nan for i in range(20)}}])
    page = Page(write_report(run_dir))
    assert "m5 is NaN or infinite at step 1 and 14 more metrics" in page.text


def test_all_scripts_and_broken_characters_survive(run_dir: Path) -> None:
    texts = [
        "Ich weiß nicht",
        "数值是 2,111 \U0001f600",
        "line\u2028separator\x00\x1b[31m",
        "lone \ud800 surrogate",
    ]
    (run_dir / "samples.jsonl").write_text("".join(json.dumps(sample(1, "u", output=t)) + "\n" for t in texts))
    page = Page(write_report(run_dir))
    assert [row["output"] for row in page.samples] == [*texts[:3], "lone ? surrogate"]


def test_an_older_report_stays_when_a_new_one_fails(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_report(run_dir)
    before = path.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(run_dir)
    assert path.read_bytes() == before
    assert [file.name for file in run_dir.iterdir() if "report" in file.name] == ["report.html"]


def test_the_summary_compares_before_and_after(run_dir: Path) -> None:
    rows = [
        {"name": "gold", "before": 0.604, "after": 0.967, "note": "1 hop"},
        {"name": "gate", "after": "ok"},
    ]
    summary = {"title": "Self-play", "rows": [*rows, "nonsense"], "notes": ["88 % right"]}
    (run_dir / "summary.json").write_text(json.dumps(summary))
    assert summary_rows(summary) == [
        {"name": "gold", "before": "0.604", "after": "0.967", "change": "+0.363", "note": "1 hop"},
        {"name": "gate", "before": "", "after": "ok", "change": "", "note": ""},
    ]
    text = Page(write_report(run_dir)).text
    assert text.index("Self-play") < text.index("88 % right") < text.index("+0.363") < text.rindex("Curves")


def test_panels_stand_first_and_name_what_is_missing(run_dir: Path) -> None:
    (run_dir / "panels.json").write_text(json.dumps({"Reward and truth": ["reward/responder", "audit/wrong"]}))
    text = Page(write_report(run_dir)).text
    assert "Reward and truth reward/responder 0.550 → 0.750 audit/wrong not measured yet" in text
    assert text.index("Reward and truth") < text.index("All metrics")


def test_the_configuration_is_shown_block_by_block() -> None:
    config = {
        "method": "spell",
        "policy": {"lora": None, "trainer": {"betas": [0.9, 0.99]}},
        "seed": 0,
        "empty": {},
    }
    assert config_blocks(config) == [
        ("", [("method", "spell"), ("seed", "0"), ("empty", "{}")]),
        ("policy", [("lora", "null")]),
        ("policy.trainer", [("betas", "[0.9, 0.99]")]),
    ]


def test_times_are_summed_and_rates_are_not() -> None:
    rows = timing_rows({1: {"seconds": 1.0, "tokens_per_s": 10.0}, 2: {"seconds": 4.0, "tokens_per_s": 20.0}})
    assert [(row["name"], row["median"], row["total"]) for row in rows] == [
        ("seconds", "2.50", "5"),
        ("tokens_per_s", "15", ""),
    ]


def test_importing_is_light() -> None:
    code = (
        "import sys, cluster.progress, cluster.report, cluster.tracking\n"
        "heavy = {'matplotlib', 'wandb', 'jinja2', 'rich', 'ray', 'torch', 'actors', 'methods'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr == ""
    assert Path(cluster.report.__file__).with_name("report.html.jinja").is_file()
