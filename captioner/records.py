"""The rows that stages exchange, and their Parquet files.

Every Parquet file carries its record's name and schema version in the file metadata; a file of
another record or version is refused with a :class:`~captioner.errors.DataError`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field

from captioner.errors import DataError

if TYPE_CHECKING:  # pyarrow takes a third of a second to import
    import pyarrow as pa

SCHEMA_VERSION = 1


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Candidate(Record):
    """One sampled caption of an image."""

    sample: str  # sha256 of the image bytes
    key: str
    k: int
    text: str
    finish_reason: str  # "stop": ended with the end token; "length": cut by the limit; "error: ..."
    mean_logprob: float
    tokens: int
    seed: int
    repeats: int = 0  # statements that were said before in this caption, or go round in a circle
    duplicate_of: int | None = None  # k of the first candidate of the image that says the same

    @property
    def error(self) -> str | None:
        """Why there is no caption, where the engine could make none."""
        return self.finish_reason if self.finish_reason.startswith("error: ") else None


class Failed(Record):
    """An image that a stage of a round could not handle; it is in none of the later stages."""

    sample: str  # sha256 of the image bytes; "" where they could not be read
    key: str
    reason: str


class Claim(Record):
    """One statement about an image and what the verifier answered: the ledger of a round.

    The last three fields are no part of its file. They are joined in from ``verdicts/``; ledgers of 0.1
    still have them.
    """

    sample: str
    key: str
    text: str
    kind: str  # kind of fact by the tool LLM ("" where it does not know)
    slot: str = ""  # of the claims about an image with one slot, such as `north color`, one at most holds
    candidates: list[int]  # k of the candidates that state it
    question: str
    expected: str  # "yes" or "no": the answer that confirms the claim
    p_yes: float  # calibrated; of all askings together
    label_mass: float  # probability of "yes" and "no" together among all tokens
    verifier: str  # hash of the verifier checkpoint
    view: str  # "all", or the tag of the one view that was asked about as well
    first_p_yes: float | None = None  # of the first asking, where it was undecided and asked again
    verdict: str = Field("abstain", exclude=True)
    p_true: float | None = Field(None, exclude=True)
    why: str = Field("", exclude=True)


class Verdict(Record):
    """What is decided about a claim: row i of a shard is about row i of that shard of the ledger."""

    sample: str
    key: str
    text: str
    verdict: str  # "keep", "drop", "abstain"
    p_true: float | None  # by P(yes), kind and votes; None where the verifier is not trusted
    why: str  # what the verdict rests on

    @classmethod
    def of(cls, claim: Claim) -> Verdict:
        return cls(**{name: getattr(claim, name) for name in cls.model_fields})

    def join(self, claim: Claim) -> Claim:
        """The claim with this verdict."""
        return claim.model_copy(update={"verdict": self.verdict, "p_true": self.p_true, "why": self.why})


class Unasked(Record):
    """A statement of an image's samples that the verifier was not asked about, and why."""

    sample: str
    key: str
    text: str
    candidates: list[int]  # k of the candidates that state it
    why: str


class Planted(Record):
    """A claim whose answer is known, with the verifier's: what its accuracy is measured on."""

    sample: str
    key: str
    text: str
    kind: str
    stratum: str  # "stated" by a sample, "swap": one word of a statement changed; or as its file says
    answer: str  # "yes" or "no"
    p_yes: float  # calibrated
    label_mass: float


class Golden(Record):
    """The caption made of an image's confirmed claims."""

    sample: str
    key: str
    text: str
    kept: int
    dropped: int
    abstained: int
    tokens: int
    over_budget: list[str] = []  # claims that stay by their verdict but left for the token budget
    sft_text: str | None = None  # with claims of kinds that nothing can judge in their places
    silent: list[str] = []  # those claims: SFT reads them and does not learn them


class Pair(Record):
    """chosen is preferred to rejected."""

    sample: str
    key: str
    chosen: str
    rejected: str
    k: int  # candidate number of the rejected caption
    refuted_in_rejected: int
    ended: bool = True  # rejected ended by itself
    ref_chosen_logp: float | None = None
    ref_rejected_logp: float | None = None
    ref_masked_logp: float | None = None  # of chosen with gray views, where dpo.image_weight asks for it
    ref_unpaired_logp: float | None = None  # of another image's chosen caption, for the KL of `kto`
    ref_weights: str | None = None  # hashes of what the log-probabilities above were computed of
    ref_pixels: str | None = None
    ref_tokens: str | None = None


class CaptionRow(Record):
    """One image of a captioned data set."""

    id: str  # sha256 of the image bytes; "" where they could not be read
    key: str
    caption: str | None
    finish_reason: str | None
    tokens: int | None
    model: str
    config: str
    error: str | None = None
    statements: list[str] | None = None  # where the caption was verified: what it stated, in order
    p_yes: list[float] | None = None  # and the probability of "yes" for each
    fault: str | None = None  # of an error: "image", or "world" (a disk, a server): to be tried again
    p_true: list[float | None] | None = None  # that it holds; None where the verifier is not trusted
    verdicts: list[str] | None = None  # "keep", "drop", "abstain" for each


RecordT = TypeVar("RecordT", bound=Record)

_ARROW_TYPES = {"str": "string", "int": "int64", "float": "float64", "bool": "bool_"}


def arrow_schema(record: type[Record]) -> pa.Schema:
    """The Parquet columns of a record, with its name and schema version as metadata."""
    import pyarrow as pa

    def column(name: str, annotation: Any) -> pa.Field:
        plain = [part for part in get_args(annotation) if part is not type(None)]
        optional = type(None) in get_args(annotation)
        kind = plain[0] if optional else annotation
        if get_origin(kind) is list:
            return pa.field(name, pa.list_(column("item", get_args(kind)[0]).type), nullable=optional)
        return pa.field(name, getattr(pa, _ARROW_TYPES[kind.__name__])(), nullable=optional)

    stored = {name: info.annotation for name, info in record.model_fields.items() if not info.exclude}
    columns = [column(name, annotation) for name, annotation in stored.items()]
    return pa.schema(columns, metadata={"record": record.__name__, "schema_version": str(SCHEMA_VERSION)})


def write_parquet(path: Path, rows: Iterable[RecordT], record: type[RecordT]) -> None:
    """Write rows of one kind in their order; the same rows give the same bytes.

    Not atomic by itself: stages publish through :class:`captioner.runs.Shards`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(
        pa.Table.from_pylist([row.model_dump() for row in rows], schema=arrow_schema(record)), path
    )


def read_parquet(path: Path, record: type[RecordT]) -> list[RecordT]:
    """Read the rows of a file of this record; DataError for a damaged file, another record or version."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(
            f"cannot read a Parquet file of {record.__name__}: {error}", where=str(path)
        ) from error
    metadata = table.schema.metadata or {}
    found = (metadata.get(b"record", b"?").decode(), metadata.get(b"schema_version", b"?").decode())
    wanted = (record.__name__, str(SCHEMA_VERSION))
    if found != wanted:
        raise DataError(
            f"the file holds {found[0]} of schema version {found[1]}, not {wanted[0]} of {wanted[1]}",
            where=str(path),
        )
    return [record.model_validate(row) for row in table.to_pylist()]
