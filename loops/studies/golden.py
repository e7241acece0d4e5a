"""Are golden captions more complete and less false than what any sample, or vote of samples, says?

One captioner, one verifier, the same samples: each arm is another way to make one caption of them.
`recovered` is the share of what the mean sample misses that an arm says, `less false` by how much its share
of false statements is smaller. `golden` keeps claims from p_true 0.5 on; `golden by P(yes) alone` counts no
votes. The rows by kind say what the filter loses of the union of the samples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from captioner.config import Config, GoldenConfig
from captioner.lab import grid as scenes
from captioner.method import golden, rounds, verdicts
from captioner.records import Candidate, Claim
from captioner.runs import Run, Shards
from captioner.sources import resolve
from captioner.sources.folder import read_folder
from captioner.statements import split_statements
from loops import golden as golden_loop
from loops import qa, sft

COLUMNS = {
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "statements": "statements",
    "recovered": "recovered",
    "less_false": "less false",
    "true_lost": "true claims lost",
    "false_kept": "false claims kept",
    "accuracy": "verifier accuracy",
    "calibration_error": "calibration error",
}
PAIRED = "mean sample"
KEEPS = (0.1, 0.25, 0.75)  # thresholds beside that of the settings

Image = tuple[scenes.Scene, list[Candidate], list[Claim]]
Arm = Callable[[list[Candidate], list[Claim]], list[str]]  # captions of an image


def measure(config: Config, work: Path) -> Iterator[tuple[str, dict[str, float]]]:
    run_dir = work / "run"
    sft.sft(run_dir, config)
    qa.qa(run_dir, config)
    golden_loop.golden(run_dir, config)
    run = Run.open(run_dir, config, create=False)
    images = _images(run)
    said = {
        name: [arm(samples, claims) for _, samples, claims in images] for name, arm in _arms(config.golden)
    }
    union = [set(each[0]) for each in _statements(said["union"])]
    base = _scores(images, said[PAIRED])
    for name, captions in said.items():
        scores = _scores(images, captions)
        scores["recovered"] = (scores["recall"] - base["recall"]) / max(1e-9, 1 - base["recall"])
        scores["less_false"] = 1 - (1 - scores["precision"]) / max(1e-9, 1 - base["precision"])
        if name != PAIRED:
            scores |= _lost_and_kept(images, union, captions, scenes.KINDS)
        yield name, scores
    verifier = json.loads((run_dir / "round-1" / "qa" / "accuracy.json").read_text(encoding="utf-8"))
    for kind in scenes.KINDS:
        row = verifier.get(f"kind {kind}", {})
        told = {name: row[name] for name in ("accuracy", "calibration_error") if name in row}
        yield f"golden, {kind}", _lost_and_kept(images, union, said["golden"], (kind,)) | told
    yield "verifier", {name: verifier["all"][name] for name in ("accuracy", "calibration_error")}


def _images(run: Run) -> list[Image]:
    """Facts, samples and claims of every image whose claims were asked."""
    home = run.stage_dir("round-1")
    source = rounds.round_source(run.config.golden.images, 1)
    facts = {row.key: scenes.Scene.from_json(row.facts or "") for row in read_folder(resolve(source, run))}
    samples = rounds.by_key(Shards(home / "candidates", Candidate).read_all())
    claims = rounds.by_key(verdicts.read(home))
    return [(facts[key], samples[key], own) for key, own in claims.items()]


def _arms(config: GoldenConfig) -> list[tuple[str, Arm]]:
    """The ways to make a caption. Best of K ranks whole samples by the verifier's mean P(yes)."""

    def caption(stay: Callable[[Claim, int], bool]) -> Arm:
        return lambda samples, claims: [", ".join(c.text for c in claims if stay(c, len(samples)))]

    def at(keep: float) -> Arm:
        def arm(_: list[Candidate], claims: list[Claim]) -> list[str]:
            distrusted = {claim.kind: "" for claim in claims if claim.p_true is None}
            judged = verdicts.judge(claims, verdicts.Thresholds(keep, min(keep, config.drop), distrusted))
            return [", ".join(claim.text for claim in judged if claim.verdict == "keep")]

        return arm

    def best(samples: list[Candidate], claims: list[Claim]) -> list[str]:
        def mean(one: Candidate) -> float:
            own = [verdicts.confidence(claim) for claim in claims if one.k in claim.candidates]
            return sum(own) / len(own) if own else 0.0

        return [max(samples, key=mean).text]

    return [
        (PAIRED, lambda samples, _: [each.text for each in samples]),
        ("best of K", best),
        ("union", caption(lambda *_: True)),
        ("majority vote", caption(lambda claim, count: 2 * len(claim.candidates) > count)),
        ("golden", caption(lambda claim, count: golden.stays(claim, count, config.abstain))),
        (
            "golden by P(yes) alone",
            caption(lambda claim, _: claim.p_true is not None and verdicts.confirmed(claim) >= config.keep),
        ),
        *((f"golden, keep {keep}", at(keep)) for keep in KEEPS),
        ("golden, abstained kept", caption(lambda claim, _: claim.verdict != "drop")),
    ]


def _scores(images: Sequence[Image], captions: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision and recall of facts over all captions; several captions of an image share its weight."""
    true = false = recalled = facts = statements = 0.0
    for (scene, _, _), own in zip(images, captions, strict=True):
        for text in own:
            judged = scenes.judge(text, scene)
            true, false = true + judged.true / len(own), false + judged.false / len(own)
            recalled, facts = recalled + judged.recalled / len(own), facts + judged.facts / len(own)
            statements += judged.statements / len(own)
    precision, recall = true / max(true + false, 1e-9), recalled / max(facts, 1e-9)
    f1 = 2 * precision * recall / max(precision + recall, 1e-9)
    return {"precision": precision, "recall": recall, "f1": f1, "statements": statements / len(images)}


def _statements(captions: Sequence[Sequence[str]]) -> list[list[list[str]]]:
    """The canonical statements of every caption of every image."""
    return [
        [[known for part in split_statements(text) if (known := scenes.normalise(part))] for text in own]
        for own in captions
    ]


def _lost_and_kept(
    images: Sequence[Image],
    union: Sequence[set[str]],
    captions: Sequence[Sequence[str]],
    kinds: Sequence[str],
) -> dict[str, float]:
    """Of what all samples together say of these kinds: what share of the true is lost, of the false kept."""
    counts = {True: [0, 0], False: [0, 0]}  # truth -> [said in the caption, said by the union]
    for (scene, _, _), everything, own in zip(images, union, _statements(captions), strict=True):
        for text in everything:
            if scenes.kind_of(text) in kinds:
                truth = bool(scenes.execute(text, scene))
                counts[truth][0] += text in own[0]
                counts[truth][1] += 1
    (true, all_true), (false, all_false) = counts[True], counts[False]
    found = {"true_lost": 1 - true / all_true} if all_true else {}
    return found | ({"false_kept": false / all_false} if all_false else {})
