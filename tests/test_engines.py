import random
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captioner import prompts
from captioner.config import EngineConfig, SamplingConfig, ViewsConfig
from captioner.engines import CaptionRequest, QuestionBatch, YesNo
from captioner.engines.hf import IMAGES_PER_PREFIX_BATCH, HFEngine, pick
from captioner.errors import DataError
from captioner.models.model import Captioner
from captioner.records import Candidate
from tests.tiny import tiny_captioner, tiny_checkpoint

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SIZES = [(128, 128), (200, 90), (64, 150), (128, 128)]
QUESTIONS = ["Visible: northwest red?", "Visible: a circle above a star?", "Visible: ring?", "Gray?"]


def image(seed: int = 0, width: int = 128, height: int = 128) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def requests(count: int = 4) -> list[CaptionRequest]:
    return [CaptionRequest(f"k{i}", image(i, *SIZES[i % 4]), f"{i:064x}") for i in range(count)]


def engine(captioner: Captioner, batch_size: int = 64) -> HFEngine:
    return HFEngine(captioner, ViewsConfig(), EngineConfig(max_num_seqs=batch_size))


@pytest.fixture(scope="module", params=FAMILIES)
def captioner(request: pytest.FixtureRequest) -> Captioner:
    return tiny_captioner(request.param)


@pytest.fixture(scope="module")
def qwen3() -> Captioner:
    return tiny_captioner("qwen3_vl")


def same(ours: list[Candidate], theirs: list[Candidate]) -> None:
    assert [c.model_dump(exclude={"mean_logprob"}) for c in ours] == [
        c.model_dump(exclude={"mean_logprob"}) for c in theirs
    ]
    for a, b in zip(ours, theirs, strict=True):
        assert a.mean_logprob == pytest.approx(b.mean_logprob, abs=1e-5)


# ---- captions


@pytest.mark.slow
def test_greedy_equals_generate(captioner: Captioner) -> None:
    ours = engine(captioner)
    never = [i for i in captioner.tokenizer.all_special_ids if i not in ours._words.stops]
    sampling = SamplingConfig(temperature=0, max_tokens=20)
    for request, [candidate] in zip(requests(), ours.sample(requests(), 1, sampling), strict=True):
        prompt = ours.renderer.prompt(request.image)
        ids = torch.tensor([prompt.input_ids])
        generated = captioner.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == ours.renderer.image_pad_id).int(),
            pixel_values=prompt.pixel_values,
            image_grid_thw=prompt.image_grid_thw,
            max_new_tokens=20,
            do_sample=False,
            suppress_tokens=never,
        )[0, ids.shape[1] :]
        assert candidate.tokens == len(generated)
        assert candidate.text == captioner.tokenizer.decode(generated, skip_special_tokens=True).strip()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_samples_do_not_depend_on_the_batch(family: str) -> None:
    """In float64, where a draw does not fall on a border by rounding."""
    captioner = tiny_captioner(family, torch.float64)
    sampling = SamplingConfig(max_tokens=24, seed=3)
    expected = [engine(captioner).sample([r], 3, sampling) for r in requests()]
    alone = [next(rows) for rows in expected]
    for batch_size in (1, 2, 7, 64):
        together = list(engine(captioner, batch_size).sample(requests(), 3, sampling))
        for ours, theirs in zip(together, alone, strict=True):
            same(ours, theirs)
    backwards = list(engine(captioner).sample(requests()[::-1], 3, sampling))
    for ours, theirs in zip(backwards[::-1], alone, strict=True):
        same(ours, theirs)
    for ours, theirs in zip(engine(captioner).sample(requests(), 2, sampling), alone, strict=True):
        same(ours, theirs[:2])  # nor on how many are drawn


def test_samples_differ_by_seed_image_and_number(qwen3: Captioner) -> None:
    def texts(seed: int) -> list[str]:
        sampling = SamplingConfig(max_tokens=12, seed=seed)
        return [c.text for rows in engine(qwen3).sample(requests(2), 3, sampling) for c in rows]

    assert len(set(texts(0))) == 6 and not set(texts(0)) & set(texts(1))
    assert texts(0) == texts(0)


def test_ends_and_cuts_are_told_apart(qwen3: Captioner) -> None:
    """Many short samples of a random model: some end by themselves, the others are cut at the limit."""
    ours = engine(qwen3)
    ours._bias[ours.renderer.end_id] = 4.0  # the end is likely, so both kinds occur
    candidates = [c for rows in ours.sample(requests(2), 24, SamplingConfig(max_tokens=10)) for c in rows]
    stopped = [c for c in candidates if c.finish_reason == "stop"]
    cut = [c for c in candidates if c.finish_reason == "length"]
    assert stopped and cut and len(stopped) + len(cut) == 48
    assert all(c.tokens == 10 for c in cut) and all(1 <= c.tokens <= 10 for c in stopped)
    assert min(c.tokens for c in stopped) < 10
    assert not any("<|" in c.text for c in candidates)
    # Rows that leave the cache as others end are the same rows as alone.
    [again] = ours.sample(requests(1), 1, SamplingConfig(max_tokens=10))
    same(again, candidates[:1])


def test_a_first_token_that_ends_gives_an_empty_caption(qwen3: Captioner) -> None:
    ours = engine(qwen3)
    ours._bias[ours.renderer.end_id] = 1e4
    [[candidate]] = ours.sample(requests(1), 1, SamplingConfig(max_tokens=5))
    assert (candidate.text, candidate.tokens, candidate.finish_reason) == ("", 1, "stop")


def test_mean_logprob_is_that_of_the_forward_pass(qwen3: Captioner) -> None:
    ours = engine(qwen3)
    renderer = ours.renderer
    [[candidate]] = ours.sample(requests(1), 1, SamplingConfig(temperature=0, max_tokens=8))
    pixels, grid = renderer.images(requests(1)[0].image)
    prompt = renderer.prefix_ids(grid) + renderer.branch_ids(None)[0]
    ids, total = list(prompt), 0.0
    for _ in range(candidate.tokens):
        with torch.no_grad():
            tokens = torch.tensor([ids])
            mask, kinds = torch.ones_like(tokens), (tokens == renderer.image_pad_id).int()
            output = qwen3.model(
                input_ids=tokens,
                attention_mask=mask,
                mm_token_type_ids=kinds,
                pixel_values=pixels,
                image_grid_thw=grid,
            )
        logp = (output.logits[0, -1] + ours._bias).log_softmax(-1)
        ids.append(int(logp.argmax()))
        total += float(logp.max())
    assert candidate.mean_logprob == pytest.approx(total / candidate.tokens, abs=1e-4)


def test_markup_soft_tokens_and_padding_are_never_said(tmp_path: Path) -> None:
    captioner = tiny_checkpoint(tmp_path, padding=5)  # five rows of the head that no token belongs to
    width = captioner.model.get_output_embeddings().weight.shape[0]
    words = captioner.tokenizer
    words.add_tokens(["<|soft_0|>", "<|soft_1|>"], special_tokens=True)
    soft = words.convert_tokens_to_ids(["<|soft_0|>", "<|soft_1|>"])
    captioner.soft_prompt_ids = soft
    ours = engine(captioner)
    markup = words.convert_tokens_to_ids(
        ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|im_start|>"]
    )
    never = {*soft, *range(len(words), width), *markup}
    assert len(never) == 2 + 3 + 4
    assert {i for i in range(width) if ours._bias[i] == -torch.inf} >= never
    assert ours._bias[ours.renderer.end_id] == 0
    # Even a model that wants nothing else does not say them.
    wanted = torch.zeros(width)
    wanted[list(never)] = 1e4
    handle = captioner.model.lm_head.register_forward_hook(lambda module, args, out: out + wanted)
    try:
        seen: list[torch.Tensor] = []
        decode = words.decode
        words.decode = lambda ids, **kw: seen.append(torch.tensor(ids)) or decode(ids, **kw)
        for temperature in (0.0, 1.0):
            list(ours.sample(requests(2), 4, SamplingConfig(temperature=temperature, max_tokens=10)))
    finally:
        handle.remove()
    assert len(seen) == 16 and not set(torch.cat(seen).tolist()) & never


def test_more_samples_than_the_batch_holds(qwen3: Captioner) -> None:
    sampling = SamplingConfig(max_tokens=6)
    [many] = engine(qwen3, 4).sample(requests(1), 10, sampling)
    [expected] = engine(qwen3, 64).sample(requests(1), 10, sampling)
    same(many, expected)
    assert [c.k for c in many] == list(range(10))


def test_requests_are_taken_lazily(qwen3: Captioner) -> None:
    taken = []

    def source():
        for request in requests(4):
            taken.append(request.key)
            yield request

    rows = engine(qwen3, 2).sample(source(), 2, SamplingConfig(max_tokens=2))
    next(rows)
    assert taken == ["k0"]


def test_another_prompt_may_be_asked(qwen3: Captioner) -> None:
    sampling = SamplingConfig(temperature=0, max_tokens=6)
    other = HFEngine(qwen3, ViewsConfig(), EngineConfig(), prompt="Describe the image.")
    own = HFEngine(qwen3, ViewsConfig(), EngineConfig(), prompt=prompts.load("caption"))
    [expected] = engine(qwen3).sample(requests(1), 1, sampling)
    [same_prompt], [other_prompt] = (next(e.sample(requests(1), 1, sampling)) for e in (own, other))
    same([same_prompt], expected)
    assert other_prompt.mean_logprob != pytest.approx(same_prompt.mean_logprob, abs=1e-4)


def test_images_may_be_files(qwen3: Captioner, tmp_path: Path) -> None:
    [request] = requests(1)
    request.image.save(tmp_path / "a.png")
    sampling = SamplingConfig(max_tokens=6)
    from_file = CaptionRequest(request.key, tmp_path / "a.png", request.sample_id)
    [ours], [theirs] = (list(engine(qwen3).sample([r], 1, sampling)) for r in (from_file, request))
    same(ours, theirs)


def test_a_stale_rope_state_of_the_model_is_not_used(captioner: Captioner) -> None:
    sampling = SamplingConfig(temperature=0, max_tokens=8)
    [expected] = engine(captioner).sample(requests(1), 1, sampling)
    captioner.model.model.rope_deltas = torch.tensor([[-50]])
    [ours] = engine(captioner).sample(requests(1), 1, sampling)
    captioner.model.model.rope_deltas = None
    same(ours, expected)


# ---- picking


def test_pick_follows_the_distribution() -> None:
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.0]]).log()
    uniforms = (torch.arange(1000) + 0.5) / 1000
    tokens = pick(scores.expand(1000, -1), uniforms, SamplingConfig())
    assert tokens.bincount(minlength=5).tolist() == [100, 200, 300, 400, 0]
    half = pick(scores.expand(1000, -1), uniforms, SamplingConfig(temperature=0.5))
    expected = torch.tensor([1.0, 4, 9, 16, 0]) / 30 * 1000
    assert (half.bincount(minlength=5) - expected).abs().max() <= 1


def test_top_p_keeps_the_smallest_set() -> None:
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.0]]).log().expand(700, -1)
    uniforms = (torch.arange(700) + 0.5) / 700
    tokens = pick(scores, uniforms, SamplingConfig(top_p=0.65))
    assert tokens.bincount(minlength=5).tolist() == [0, 0, 300, 400, 0]
    assert set(pick(scores, uniforms, SamplingConfig(top_p=0.01)).tolist()) == {3}


def test_pick_never_leaves_the_support() -> None:
    scores = torch.full((2, 1000), -torch.inf)
    scores[:, 17] = 0.0
    edges = torch.tensor([0.0, 1.0])  # 1.0 cannot be drawn, but rounding can come close to it
    assert pick(scores, edges, SamplingConfig()).tolist() == [17, 17]


# ---- questions


def ask(ours: HFEngine, batches: list[QuestionBatch]) -> list[list[YesNo]]:
    return list(ours.p_yes(batches))


def close(ours: list[list[YesNo]], theirs: list[list[YesNo]]) -> None:
    assert [len(a) for a in ours] == [len(b) for b in theirs]
    for a, b in zip(chain.from_iterable(ours), chain.from_iterable(theirs), strict=True):
        assert a.p_yes == pytest.approx(b.p_yes, abs=1e-5)
        assert a.label_mass == pytest.approx(b.label_mass, abs=1e-5)


def test_questions_together_equal_the_plain_forward_pass(captioner: Captioner) -> None:
    """Asked in one batch = one ordinary forward pass each, without cache, positions or padding."""
    ours = engine(captioner)
    batches = [QuestionBatch(r.image, QUESTIONS) for r in requests()]
    answers = ask(ours, batches)
    renderer, words = ours.renderer, captioner.tokenizer
    yes, no = ([words(word)["input_ids"][0] for word in pair] for pair in (("yes", "Yes"), ("no", "No")))
    for batch, row in zip(batches, answers, strict=True):
        pixels, grid = renderer.images(batch.image)
        for question, answer in zip(batch.questions, row, strict=True):
            ids = torch.tensor([renderer.prefix_ids(grid) + renderer.branch_ids(question)[0]])
            with torch.no_grad():
                output = captioner.model(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    mm_token_type_ids=(ids == renderer.image_pad_id).int(),
                    pixel_values=pixels,
                    image_grid_thw=grid,
                )
            p = output.logits[0, -1].softmax(-1)
            mass_yes, mass_no = p[list(set(yes))].sum(), p[list(set(no))].sum()
            assert answer.label_mass == pytest.approx(float(mass_yes + mass_no), abs=1e-5)
            assert answer.p_yes == pytest.approx(float(mass_yes / (mass_yes + mass_no)), abs=1e-5)
    assert len({round(a.p_yes, 4) for row in answers for a in row}) > 8


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_answers_do_not_depend_on_the_batch(captioner: Captioner, batch_size: int) -> None:
    batches = [QuestionBatch(r.image, QUESTIONS[: 1 + i % 4]) for i, r in enumerate(requests())]
    ours = engine(captioner)
    alone = [[ask(ours, [QuestionBatch(b.image, [q])])[0][0] for q in b.questions] for b in batches]
    close(ask(engine(captioner, batch_size), batches), alone)
    close(ask(engine(captioner, batch_size), batches[::-1])[::-1], alone)
    turned = [QuestionBatch(b.image, b.questions[::-1]) for b in batches]
    close([row[::-1] for row in ask(engine(captioner, batch_size), turned)], alone)


def test_any_order_any_company_any_view(qwen3: Captioner) -> None:
    """What stands beside a question changes nothing: other questions, views, images, repeated ones."""
    rng = random.Random(0)
    views = ("all", "whole", "top left")
    asks = [(i, view, q) for i in range(3) for view in views for q in QUESTIONS]
    ours = [engine(qwen3, size) for size in (1, 2, 7, 64)]
    alone = {
        (i, view, q): ask(ours[0], [QuestionBatch(image(i, *SIZES[i]), [q], view)])[0][0]
        for i, view, q in asks
    }
    for each in ours:
        batches: list[tuple[int, str, list[str]]] = []
        for i, view, q in rng.choices(asks, k=30):  # with repetition, in any order
            if batches and batches[-1][:2] == (i, view) and rng.random() < 0.7:
                batches[-1][2].append(q)
            else:
                batches.append((i, view, [q, *rng.sample(QUESTIONS, rng.randrange(3))]))
        answers = ask(each, [QuestionBatch(image(i, *SIZES[i]), own, view) for i, view, own in batches])
        close(answers, [[alone[i, view, q] for q in own] for i, view, own in batches])


def test_none_one_and_five_hundred_questions(qwen3: Captioner) -> None:
    many = [f"Visible: object {i}?" for i in range(500)]
    batches = [QuestionBatch(image(0), many), QuestionBatch(image(1), []), QuestionBatch(image(2), many[:1])]
    answers = ask(engine(qwen3), batches)
    assert [len(row) for row in answers] == [500, 0, 1]
    [[last]] = ask(engine(qwen3), [QuestionBatch(image(0), many[-1:])])
    assert answers[0][-1].p_yes == pytest.approx(last.p_yes, abs=1e-5)
    assert ask(engine(qwen3), [QuestionBatch(image(1), [])]) == [[]]
    assert ask(engine(qwen3), []) == []


def test_memory_is_bounded_however_many_questions(qwen3: Captioner, monkeypatch: pytest.MonkeyPatch) -> None:
    """No forward pass holds more than `batch_size` rows, and no more images are encoded ahead than said."""
    ours, rows, encoded = engine(qwen3, 16), [], []
    step, prefill = ours._step, ours._prefill
    monkeypatch.setattr(ours, "_step", lambda tokens, *rest: rows.append(len(tokens)) or step(tokens, *rest))
    monkeypatch.setattr(
        ours, "_prefill", lambda shown, tail: encoded.append(len(shown)) or prefill(shown, tail)
    )
    counts = [500, 1, 37, 0, 60, 2, 3, 4, 5, 120]
    batches = [QuestionBatch(image(i), [f"Visible: {j}?" for j in range(n)]) for i, n in enumerate(counts)]
    assert [len(row) for row in ask(ours, batches)] == counts
    assert max(rows) <= 16 and sum(rows) == sum(counts)
    assert max(encoded) <= IMAGES_PER_PREFIX_BATCH and sum(encoded) == len(counts)
    groups = (sum(counts[:IMAGES_PER_PREFIX_BATCH]), sum(counts[IMAGES_PER_PREFIX_BATCH:]))
    assert len(rows) == sum(
        -(-n // 16) for n in groups
    )  # questions about images encoded together go together


def test_one_view_shows_that_view_only(qwen3: Captioner) -> None:
    """The answer about one view ignores the rest of the image, and batches with others."""
    left, changed = image(0), image(0)
    changed.paste((0, 0, 0), (64, 0, 128, 128))  # all but the left half
    names = ("top left", "all", "whole")
    batches = [QuestionBatch(i, QUESTIONS[:2], view) for i in (left, changed) for view in names]
    answers = ask(engine(qwen3), batches)
    close([answers[0]], [answers[3]])
    assert abs(answers[1][0].p_yes - answers[4][0].p_yes) > 1e-4
    whole_only = HFEngine(qwen3, ViewsConfig(levels=(1,)), EngineConfig())
    close([answers[2]], ask(whole_only, [QuestionBatch(left, QUESTIONS[:2])]))
    with pytest.raises(DataError, match="no view 'bottom'"):
        ask(engine(qwen3), [QuestionBatch(left, QUESTIONS, "bottom")])


def test_training_still_works_after_the_engine(captioner: Captioner) -> None:
    """Nothing that the model caches while it answers may break a later backward pass."""
    from captioner.models.render import TrainRow, collate

    ours = engine(captioner)
    ask(ours, [QuestionBatch(image(), QUESTIONS[:1])])
    pixels, grid = ours.renderer.images(image())
    branches = [ours.renderer.branch_ids(None, "west ring")]
    batch = collate(ours.renderer, [TrainRow(pixels, grid, False, branches)])
    captioner.model(**batch).loss.backward()
    assert captioner.model.model.visual.patch_embed.proj.weight.grad.abs().sum() > 0
    captioner.model.zero_grad()
