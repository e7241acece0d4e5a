"""The sections of the stages: every setting, with its limits, unit and "off" value."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from captioner.config.base import Section
from captioner.config.models import (
    AdapterTuning,
    ModelConfig,
    SoftPromptConfig,
    TrainingConfig,
    Tuning,
    ViewsOverride,
    check_round,
)


class SFTConfig(Section):
    data: tuple[str, ...] = ("scenes:sft:512",)
    """Image folders with captions, or `scenes:SPLIT:COUNT`."""
    validation: str | None = "scenes:validation:64"
    """Folder or scenes for the validation loss; None = off."""
    columns: tuple[Literal["shorthand", "prose", "questions"], ...] = ("shorthand",)
    """What is learned of each row: its shorthand caption (`text`), its prose caption, its questions."""
    questions_per_image: int = Field(8, ge=1)
    """Questions drawn per image and epoch where `columns` has questions."""
    multi_view_share: float = Field(1.0, ge=0, le=1)
    """Share of the batches that show all views; the others show the whole view only."""
    tuning: Tuning = AdapterTuning()
    soft_prompt: SoftPromptConfig = SoftPromptConfig()
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _can_stop(self) -> Self:
        if self.training.early_stopping_patience and self.validation is None:
            raise ValueError("training.early_stopping_patience needs a validation loss: set sft.validation")
        return self


class QAConfig(Section):
    data: str = "scenes:qa:512"
    """Image folder or question file (VQAv2, GQA, POPE, ...), or `scenes:SPLIT:COUNT`."""
    questions_per_image: int = Field(16, ge=2)
    """Questions drawn per image and step; they share the image's forward pass."""
    holdout: float = Field(0.15, gt=0, lt=1)
    """Share of the images kept for measuring accuracy; split by image."""
    band_accuracy: float = Field(0.7, ge=0.5, lt=1)
    """What "yes" and "no" must reach on held-out questions; where they do not, a claim may be asked again."""
    training: TrainingConfig = TrainingConfig(max_steps=150)
    tuning: Tuning = AdapterTuning(vision_width=0)

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        check_round(self.training, self.tuning)
        return self


class SamplingConfig(Section):
    temperature: float = Field(1.0, ge=0)
    """0 = greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Smallest set of tokens with this probability mass; 1 = all."""
    max_tokens: int = Field(160, ge=1)
    """Longest caption in tokens, the end token included."""
    seed: int = 0
    """Every row's seed is derived from this, its image and its sample number."""


class ServerConfig(Section):
    """Servers that speak the OpenAI protocol; a key is read from the environment, OPENAI_API_KEY."""

    urls: tuple[Annotated[str, Field(pattern=r"^https?://[^\s/]+")], ...] = Field(
        ("http://127.0.0.1:8000/v1",), min_length=1
    )
    """Base addresses of the servers, up to and including `/v1`; the work is spread over them."""
    model: str | None = None
    """Model name to ask for; None = see the section's `type`."""
    in_flight: int = Field(32, ge=1)
    """Requests that one server works on at the same time."""
    timeout: float = Field(300.0, gt=0)
    """Seconds after which a request without its whole answer counts as failed and its server as stalled."""
    retries: int = Field(3, ge=0)
    """Further tries of a request that failed or whose answer is unusable."""
    wait: float = Field(900.0, ge=0)
    """Seconds to wait while no server answers."""


class EngineConfig(ServerConfig):
    type: Literal["hf", "server", "vllm"] = "hf"
    """`hf` = transformers in this process, `vllm` = vLLM in this process, `server` = vLLM servers at `urls`
    (those that `captioner serve` started on the checkpoint, or that serve `model`)."""
    max_num_seqs: int = Field(64, ge=1)
    """Sequences per forward pass of `hf`; sequences that vLLM works on at the same time."""
    max_model_len: int | None = Field(None, ge=16)
    """Longest sequence of vLLM, tokens; None = all views of an image and 1024 more, if the model can."""
    vllm_python: str | None = None
    """Interpreter with vLLM that `captioner serve` starts; None = the one that runs the command."""
    serve: bool = False
    """Of the type `server`: each stage starts one for its checkpoint, on `vllm_python`, and ends it; with
    --gpus one on every GPU. `urls` are not read then."""


class ToolConfig(ServerConfig):
    """The tool LLM: merges captions, asks questions, rewrites captions."""

    type: Literal["rules", "server"] = "rules"
    """`rules` = deterministic, no model; `server` = an instruction-tuned LLM at `urls` (`model`, else the
    first that the server lists)."""
    max_tokens: int = Field(4096, ge=16)
    """Longest answer, tokens."""
    statements: int = Field(40, ge=1)
    """Statements made into questions per request."""


class GoldenConfig(Section):
    images: str = "scenes:round:256"
    """Unlabelled images of the round. Round N of `scenes:...` takes its own part."""
    samples: int = Field(6, ge=1)
    """Captions sampled per image."""
    sampling: SamplingConfig = SamplingConfig()
    keep: float = Field(0.5, gt=0, lt=1)
    """Probability that it holds from which a claim is kept."""
    drop: float = Field(0.3, gt=0, lt=1)
    """Probability below which a claim is dropped; between the two it abstains."""
    reask: tuple[Literal["view", "wording"], ...] | None = None
    """How an undecided claim is asked again: on the view that covers it best, in a second wording.
    None = in the ways that proved right on the verifier's held-out questions."""
    planted: str | None = None
    """File of claims with human-checked answers that the verifier is measured on, such as what `captioner
    review` left in RUN/review; None = facts of the images if there are any, else their captions and those of
    the held-out images of qa.data, and questions."""
    planted_images: int = Field(64, ge=1)
    """Images whose captions, facts or questions give the planted claims."""
    min_accuracy: float = Field(0.65, ge=0, le=1)
    """Verifier accuracy on planted claims below which the round is refused."""
    min_kind_accuracy: float = Field(0.9, ge=0, le=1)
    """Accuracy on planted claims of a kind below which no claim of that kind is kept."""
    min_drop_accuracy: float = Field(0.7, ge=0, le=1)
    """Accuracy on planted claims of a kind below which none is refuted either: all of that kind abstain."""
    abstain: Literal["majority", "leave_out", "keep"] = "leave_out"
    """An abstained claim stays if most samples state it, is left out, or stays."""
    max_questions: int = Field(120, ge=1)
    """Claims asked about per image; the rarest leave first and are counted."""
    max_tokens: int = Field(150, ge=1)
    """Token budget of a golden caption; the least certain claims leave first."""
    shard_rows: int = Field(32, ge=1)
    """Images per published shard."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.drop > self.keep:
            raise ValueError("drop must not lie above keep")
        return self


class PairsConfig(Section):
    rejected_per_image: int = Field(2, ge=1)
    """Own samples set against each golden caption, those with most refuted claims first."""
    min_refuted: int = Field(1, ge=0)
    """Refuted claims a rejected sample must hold."""
    max_tokens: int = Field(256, ge=2)
    """Longest caption of a pair in tokens, the end token included; a longer one drops its pair, uncut."""
    max_similarity: float = Field(0.98, gt=0, le=1)
    """Share of tokens that chosen and rejected may have in common, in order; above it the pair is dropped."""
    max_dropped: float = Field(0.2, ge=0, le=1)
    """Share of the pairs that the linter may drop before the command exits 3."""
    max_length_ratio: float = Field(2.0, ge=1)
    """Most that mean tokens of chosen and of rejected may differ by, as a factor, before it exits 3."""


Loss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sigmoid_norm", "kto",
]  # fmt: skip
MARGIN_LOSSES = {"sigmoid", "hinge", "exo_pair", "robust", "discopop"}  # functions of the pair's margin alone


class AlarmsConfig(Section):
    """What stops a preference training; compared with the reference that it starts from."""

    every: int = Field(20, ge=0)
    """Steps between two looks at what the captioner writes; each checkpoint is looked at too. 0 = off."""
    images: int = Field(16, ge=1)
    """Images of the round that it captions then, greedily."""
    max_tokens: int = Field(160, ge=1)
    """Longest of those captions, tokens."""
    max_change: float = Field(0.1, gt=0, le=1)
    """How far the share that ends may fall, or that of repeated statements rise."""
    max_length_ratio: float = Field(2.0, gt=1)
    """Factor by which their mean length may change, up or down."""
    max_kl: float | None = Field(1.0, gt=0)
    """Kullback-Leibler divergence from the SFT captioner, nats a token of golden captions; None = off."""
    chosen_below: int = Field(10, ge=0)
    """Steps in a row with chosen captions less likely than under the reference; 0 = off."""
    max_chosen_fall: float = Field(1.0, ge=0)
    """By how much less, nats a caption (mean of a batch)."""


class DPOConfig(Section):
    loss_type: tuple[Loss, ...] = Field(("sigmoid",), min_length=1)
    """Losses of TRL's DPOTrainer by name, summed; `kto` alone is its KTOTrainer."""
    loss_weights: tuple[float, ...] = ()
    """Weight of each of them; none = 1 each."""
    beta: float = Field(0.1, gt=0)
    """Strength of the pull to the reference, Rafailov et al. 2023, eq. 7."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of pairs taken to be swapped, for `robust`, `exo_pair` and `aot`."""
    ce_weight: float = Field(1.0, ge=0)
    """Weight of the cross-entropy on the chosen caption (token mean)."""
    anchor_weight: float = Field(0.0, ge=0)
    """Weight of the anchor, which keeps the chosen caption as likely as under the reference. 0 = off."""
    image_weight: float = Field(0.0, ge=0)
    """Weight of preferring the chosen caption with the image to it with gray views. 0 = off."""
    length_margin: float = 0.0
    """Added to the margin per token that chosen is longer than rejected; > 0 holds length back. 0 = off."""
    refuted_weight: float = Field(1.0, ge=0)
    """Weight of the tokens of refuted statements, in both captions; 1 = as any token."""
    confirmed_weight: float = Field(1.0, ge=0)
    """Weight of the tokens of confirmed statements, in both captions; 1 = as any token."""
    golden_sft_steps: int = Field(40, ge=0)
    """SFT steps on golden captions before DPO; the result is the round's reference. 0 = off."""
    golden_sft_learning_rate: float = Field(1e-3, gt=0)
    """Peak rate of that SFT."""
    golden_sft_samples: int = Field(0, ge=0)
    """Rejected samples of each image that this SFT learns beside its golden caption; 0 = golden alone."""
    tuning: Tuning = AdapterTuning()
    training: TrainingConfig = TrainingConfig(
        max_steps=40, per_device_train_batch_size=8, learning_rate=3e-4, save_steps=20
    )
    alarms: AlarmsConfig = AlarmsConfig()

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        check_round(self.training, self.tuning)
        if self.loss_weights and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(f"{len(self.loss_type)} losses have {len(self.loss_weights)} loss_weights")
        if "exo_pair" in self.loss_type and not self.label_smoothing:
            raise ValueError("exo_pair needs a label_smoothing above 0, such as 0.001")
        if "kto" in self.loss_type and (
            self.loss_weights or len(self.loss_type) > 1 or self.anchor_weight or self.image_weight
        ):
            raise ValueError("kto stands alone: no second loss, loss_weights, anchor_weight or image_weight")
        if self.length_margin and not set(self.loss_type) <= MARGIN_LOSSES:
            raise ValueError(f"length_margin goes with {', '.join(sorted(MARGIN_LOSSES))} only")
        return self


class EvaluateConfig(Section):
    data: str = "scenes:test:200"
    """Held-out images of the final table."""
    max_tokens: int = Field(160, ge=1)
    """Longest caption in tokens; decoding is greedy."""
    bootstrap: int = Field(2000, ge=100)
    """Resamples of the confidence intervals, drawn over images."""
    tokenizer: str | None = None
    """Folder with the tokenizer that counts the captions' tokens, such as the image generator's; None = the
    tokens that the captioner generated."""
    clip: str | None = None
    """CLIP or SigLIP checkpoint that scores how captions fit their images; None = no such score."""


class JudgeConfig(Section):
    """Who tells what is true of images, at the gate and in `captioner evaluate`."""

    facts: str | None = None
    """JSON Lines file with a complete list of facts per image; None = the facts that the images come with."""
    checked: str | None = None
    """JSON Lines file with people's answers about claims on these images, as `captioner review --gate` writes
    it; None = those of the run at hand, once they are enough."""
    checkpoint: str | None = None
    """Verifier that judges (`captioner/` of a QA stage); never one that made a round's golden captions."""
    train: bool = True
    """Where nothing else tells, train a verifier for it: from the base, on half of the QA images."""
    samples: int = Field(4, ge=1)
    """Captions sampled per image and captioner for the verifier's pool of claims."""
    false_pass: float = Field(0.75, ge=0, lt=1)
    """Share of false new claims that the verifier is assumed to confirm, until people have checked enough."""


class GateConfig(Section):
    data: str = "scenes:validation:256"
    """Held-out images on which a round is compared with its start."""
    max_hallucinated_rise: float = Field(0.01, ge=0)
    """Rise of the share of false statements that must be ruled out: the interval's upper end."""
    max_recall_loss: float = Field(0.03, ge=0)
    """Recall at equal length that a round may lose: the loss ruled out by the interval (1 = all)."""
    max_whole_recall_loss: float = Field(0.05, ge=0)
    """The same for recall of the whole captions, which shorter captions lower."""
    max_repeated_rise: float = Field(0.01, ge=0)
    """Rise of the share of repeated statements that must be ruled out."""
    max_length_ratio: float = Field(1.5, gt=1)
    """Factor by which the mean length may change, up or down; the interval lies within."""
    min_ended: float = Field(0.99, ge=0, le=1)
    """Share of captions that must end by themselves."""
    judge: JudgeConfig = JudgeConfig()


class TripwireConfig(Section):
    """Shares of rows above which a captioning job warns or stops; they are judged block by block."""

    action: Literal["warn", "stop", "off"] = "warn"
    """What a tripwire does: a warning, exit 3, or nothing."""
    rows: int = Field(1000, ge=10)
    """Rows of a block."""
    same: float = Field(0.02, ge=0, le=1)
    """Different images with one and the same caption."""
    empty: float = Field(0.01, ge=0, le=1)
    """Captions without a word."""
    refused: float = Field(0.01, ge=0, le=1)
    """Captions that begin as a refusal does ("I'm sorry", "I cannot")."""
    cut: float = Field(0.2, ge=0, le=1)
    """Captions cut by the token limit."""
    repeated: float = Field(0.02, ge=0, le=1)
    """Captions in which more than half of the statements were said before or go round in a circle."""
    failed: float = Field(0.2, ge=0, le=1)
    """Rows without a caption."""
    drift: float = Field(0.5, ge=0)
    """Change of the mean length in tokens against the first block, as a share of that."""


class CaptionConfig(Section):
    checkpoint: str | None = None
    """Captioner to use; None = the newest promoted one of the run."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.0)
    shard_rows: int = Field(256, ge=1)
    """Images per published shard where the input has no shards of its own."""
    best_of: int = Field(1, ge=1)
    """Captions sampled per image; the one with the most confirmed statements stays. Needs --verify."""
    drop: float = Field(0.4, gt=0, lt=1)
    """P(yes) below which --drop-refuted leaves a statement out, where the captioner itself is asked."""
    verifier: str | None = None
    """Run or exported captioner whose verifier --verify asks; None = the one exported with the captioner,
    else that of the run at hand, else the captioner itself."""
    prepare_processes: int | None = Field(None, ge=0)
    """Processes per worker that decode images and cut views; 0 = the worker itself, None = all other cores.
    On Ray 0 = the worker itself, else tasks of the cluster."""
    reduced_decode: bool = True
    """Decode JPEGs at a half, a quarter or an eighth of their size where every view still has its pixels."""
    attempts: int = Field(2, ge=1)
    """Times that an image may end the process that reads or captions it."""
    stall: float = Field(1800.0, gt=0)
    """Seconds without a row after which a worker counts as dead."""
    status_every: float = Field(5.0, gt=0)
    """Seconds between two writings of the status file."""
    prometheus: str | None = None
    """File for the same numbers as Prometheus text (its name ends in .prom); None = none."""
    ray_address: str | None = None
    """Ray cluster to join, such as `auto`; None = the one in RAY_ADDRESS, else a new one on this machine."""
    tripwires: TripwireConfig = TripwireConfig()
    prepare_seconds: float = Field(60.0, gt=0)
    """Seconds that one image may take to be read and cut; then its process is ended, and the image fails."""
    memory: float = Field(4.0, gt=0)
    """GiB that images on their way to the engines may take on one machine; half of it for a single image."""
    outage: float = Field(3600.0, ge=0)
    """Seconds to wait for a disk of the input that is gone; then the job stops, to be begun again."""
    join: bool = False
    """Several machines give the same command with one output on a file system that they share."""
    work: str | None = None
    """Folder of this machine where a job works whose output is in an object store; None = of the cache."""

    @model_validator(mode="after")
    def _sampled(self) -> Self:
        if self.best_of > 1 and self.sampling.temperature == 0:
            raise ValueError("best_of above 1 needs caption.sampling.temperature above 0")
        return self


class Config(Section):
    """The whole of a run."""

    seed: int = 0
    """Base of every seed; each section's own seed is added to it."""
    max_failed: float = Field(0.05, ge=0, le=1)
    """Share of rows that may fail before a stage exits 3."""
    model: ModelConfig = ModelConfig()
    views: ViewsOverride = ViewsOverride()
    engine: EngineConfig = EngineConfig()
    tool: ToolConfig = ToolConfig()
    sft: SFTConfig = SFTConfig()
    qa: QAConfig = QAConfig()
    golden: GoldenConfig = GoldenConfig()
    pairs: PairsConfig = PairsConfig()
    dpo: DPOConfig = DPOConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    gate: GateConfig = GateConfig()
    caption: CaptionConfig = CaptionConfig()
