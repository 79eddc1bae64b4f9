"""The options of a run, by section: types, limits and defaults, which are also those of params.yaml.

Each section is frozen and checked on construction. `gainlora.config` puts them together.
"""

import re
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from gainlora.errors import GainLoRAError, short_repr

MANY = 1_000_000_000
"""Upper limit of numbers without a smaller one."""
Positive = Annotated[float, Field(gt=0, le=MANY, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, le=MANY, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
_from_list = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Names = Annotated[tuple[Text, ...], _from_list]
Numbers = Annotated[tuple[int, ...], _from_list]


def is_name(text: str) -> bool:
    """Whether `text` may name an order or a task: names become parts of paths and must not leave a folder."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", text) is not None


class Section(BaseModel):
    """Options with their types, limits and defaults. Construction raises pydantic's ValidationError."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class ModelConfig(Section):
    """The frozen base model."""

    name: Text = "smollm2-135m"
    """A model of params.yaml's `models` (`smollm2-135m`, the embedded one, `t5-large`, ...), a hub id, or a folder."""
    source: Text | None = None
    """Hub id or folder of the model called `name`; null: `name` itself."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen base. `auto`: bfloat16 where the device computes in it, float32 elsewhere.
    Branches, gates, bases and covariances are float32 in every case."""
    tf32: bool = False
    """On a GPU, multiply a float32 base's matrices as TF32 (10 bits), several times faster. Branches, gates, bases and
    covariances stay exact; gradients are rounded."""
    compile: bool = False
    """Train with torch.compile: minutes for each task's first step, then faster ones. Not with `tf32`, `device_map`,
    `train.gradient_checkpointing` or FSDP."""
    device_map: Literal["auto"] | None = None
    """`auto`: one process spreads the base over its GPUs, some layers on each; null: all of it on the first."""

    @property
    def location(self) -> str:
        """Where the weights are."""
        return self.source or self.name


class DataConfig(Section):
    """How task files become examples and tokens."""

    protocol: Literal["published", "corrected"] | None = None
    """A published protocol whose options params.yaml's `protocols` lays over the order's; null: none."""
    max_prompt_tokens: int = Field(default=160, ge=8, le=1_000_000)
    """Limit of a prompt, special tokens included; `truncate` says which part a longer prompt loses."""
    truncate: Literal["start", "end", "input"] = "input"
    """`input`: the end of the instance's input, then, if that is not enough, the end of the definition. `start`, `end`:
    that side of the whole prompt (the authors' Llama and T5; `end` may lose the question and "Output:")."""
    max_target_tokens: int = Field(default=50, ge=1, le=1_000_000)
    """Longer targets lose tokens at their end."""
    train_limit: int | None = Field(default=320, ge=1, le=MANY)
    """Training examples per task, the same for every seed; null takes all."""
    test_limit: int | None = Field(default=100, ge=1, le=MANY)
    """Test examples per task, the same for every seed; null takes all."""
    references: Literal["all", "first", "sampled"] = "all"
    """Score against every reference of an instance (best match), the first, or one drawn at random (the authors'
    protocol), the same in every run. Training takes the drawn one with `sampled`, else the first."""
    validation: Literal["dev", "auto"] | Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Held out from training, for validation and `train.keep: best`. A fraction of the training examples
    (0: none); `dev`: the task's dev.json, refused if it shares an input with test.json; `auto`: dev.json if it shares
    none, else a fifth of the training examples."""
    validation_limit: int | None = Field(default=200, ge=1, le=MANY)
    """Validation examples evaluated per task, the same for every seed; null takes all."""
    template: Literal["chat"] | None = None
    """`chat`: prompts are messages of a user in the tokenizer's chat template, with the text of the order's template
    but its "Output:"; null: the order's template alone."""
    instruction: Literal["task", "none"] = "task"
    """`none`: prompts without the tasks' instructions."""
    replay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of each task's training examples that is kept and trained on again with every later task. 0: no old data,
    as continual learning here is meant; more shows what that gives up."""
    skip_incomplete: bool = False
    """Run an order without the tasks whose files are missing, and record that."""


class LoraConfig(Section):
    """Low-rank branches: e = W h + (alpha / rank) * sum_i a_i B_i A_i h."""

    rank: int = Field(default=8, ge=1, le=65_536)
    """Rows of A_i, columns of B_i."""
    alpha: Positive = 16.0
    """Scaling numerator."""
    targets: Annotated[Names, Field(min_length=1)] | None = None
    """Names of the linear layers to adapt; null: q and v projections of every attention."""


class GateConfig(Section):
    """The gating module g_i, one per task (used by `gainlora-*` methods)."""

    hidden: int = Field(default=50, ge=1, le=65_536)
    """Width of the hidden layer(s): 100 for T5, 50 for Llama in the paper."""
    depth: int = Field(default=2, ge=1, le=64)
    """L, the number of hidden layers: shapes d -> hidden -> ... -> d."""
    score: Literal["cosine", "linear"] = "cosine"
    """`cosine`: b = 4 cos(p_L, key), the authors' code. `linear`: b = key . p_L, the paper's equation."""
    key_norm: Positive | None = None
    """Norm of a new key; null: sqrt(d / 3), the authors' T5. A `random` key is about as long and then not rescaled."""
    initial_key: Literal["orthogonal", "random", "open"] = "orthogonal"
    """A new key: `orthogonal` to the memory. Ablations: `random`, uniform in [-1, 1], the paper's; `open`, the task's
    strongest direction without regard to the memory, which opens the gate on nearly every prompt."""
    initial_direction: Literal["svd", "random"] = "svd"
    """Direction of an `orthogonal` or `open` key: the strongest one of the task's features, or a Gaussian."""
    constrain_update: bool = True
    """False (ablation): the gate trains without the memory's constraint."""
    learning_rate: Positive | None = None
    """Of the gate, key and hidden layers; null: train.learning_rate."""
    trained: Literal["all", "key"] = "all"
    """`key`: the hidden layers keep their first values; only keys are learned."""


class SubspaceConfig(Section):
    """Gradient projection memory of gates and of InfLoRA's layers."""

    threshold: Share = 0.995
    """Share of energy that a layer's basis keeps at task 1; rises to 1 over `horizon` tasks."""
    gate_threshold: Share = 0.995
    """The same for the gate's bases."""
    energy: Literal["covariance", "representation"] = "covariance"
    """Energy of a direction: singular value of the covariance squared (the authors), or the value itself."""
    horizon: int | None = Field(default=None, ge=1, le=1_000_000)
    """H of the schedule e_t = e + (1 - e) (t - 1) / H; null: the number of tasks of the order."""
    covariance_blocks: int = Field(default=1, ge=1, le=65_536)
    """Keep layer covariances block-diagonal, b blocks of d/b inputs (for d of several thousand)."""
    max_examples: int | None = Field(default=160, ge=1, le=MANY)
    """Cap on the training examples of a pass for covariances (or EWC's Fisher); null: all that are trained on."""


class TrainConfig(Section):
    """Learning one task."""

    learning_rate: Positive = 1e-3
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    epochs: int = Field(default=1, ge=1, le=1_000_000)
    task_epochs: dict[str, Annotated[int, Field(ge=1, le=1_000_000)]] = Field(default_factory=dict)
    """Epochs of single tasks, by name, in place of `epochs`; a method that learns all tasks at once ignores it."""
    min_steps: int | None = Field(default=64, ge=1, le=MANY)
    """Least number of optimizer steps per task: a task of few examples gets more epochs instead; null: none."""
    patience: int | None = Field(default=None, ge=1, le=MANY)
    """Stop a task's training after that many validations in a row without a better one; null: never."""
    keep: Literal["last", "best"] = "last"
    """State that training keeps: that of the last step, or the best on `data.validation` (score, then loss)."""
    batch_size: int = Field(default=4, ge=1, le=1_000_000)
    """Examples per optimizer step."""
    micro_batch_size: int | None = Field(default=None, ge=1, le=1_000_000)
    """Examples per forward pass (gradient accumulation); null: batch_size. Must divide batch_size."""
    weight_decay: NotNegative = 0.0
    penalty_weight: NotNegative | None = None
    """Factor of the rule's penalty in the loss (olora, nlora, clora, ewc); null: the rule's own (gainlora/rules)."""
    max_grad_norm: Positive | None = 1.0
    """Clip the gradient's norm; null: never."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward (non-reentrant): less memory, more time."""
    checkpoint_every: int | None = Field(default=50, ge=1, le=MANY)
    """Steps between two checkpoints of a task in training: at most that many are repeated after a crash. null: none."""

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> Self:
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise GainLoRAError(
                f"train.micro_batch_size: {self.micro_batch_size} does not divide train.batch_size ({self.batch_size})."
            )
        return self


class EvaluateConfig(Section):
    """Generation on the seen tasks' test examples."""

    batch_size: int = Field(default=25, ge=1, le=1_000_000)
    num_beams: int = Field(default=1, ge=1, le=256)


class TaskSource(Section):
    """Where a task of an order is, and how to read it."""

    path: Text | None = None
    """Folder or file, relative to the order's `data`, or hub:OWNER/NAME@REVISION; null: what bears the task's name."""
    input: Text | None = None
    """Column of the input; null: recognized."""
    output: Text | None = None
    """Column of the answer; null: recognized."""
    instruction: str | None = None
    """Stands in every prompt; null: the files' definition."""


class OrderConfig(Section):
    """A sequence of tasks."""

    name: str
    data: Text
    """Folder with one folder per task, each with train.json and test.json."""
    template: Literal["superni", "long_sequence"]
    """Prompt template."""
    metric: Literal["rouge_l", "exact_match"]
    """Score of a task, 0 to 100."""
    tasks: Names
    """Task folders in the order they are learned; empty for tasks in memory."""
    sources: dict[str, TaskSource] = Field(default_factory=dict)
    """Tasks that are elsewhere, have other columns, or whose files lack the instruction."""

    def path(self, name: str) -> str:
        """Where a task is."""
        path = (self.sources.get(name) or TaskSource()).path or name
        return path if path.startswith("hub:") else f"{self.data}/{path}"

    @model_validator(mode="after")
    def _distinct_names(self) -> Self:
        where = f"orders.{self.name}"
        for name in (self.name, *self.tasks):
            if not is_name(name):
                raise GainLoRAError(
                    f"{where}: {short_repr(name)} cannot name an order or a task; use letters, digits, _ - and ."
                )
        for name in self.tasks:
            if self.tasks.count(name) > 1:
                raise GainLoRAError(f"{where}.tasks: {name!r} appears more than once.")
        return self


class LaunchConfig(Section):
    """Processes of a run; they affect what is learned only by rounding."""

    num_processes: int = Field(default=1, ge=1, le=4096)
    """Processes of `accelerate launch`, one for each GPU; they share the examples of a step and of a pass."""
    config: Text | None = None
    """accelerate's configuration file, e.g. configs/fsdp.yaml; null: this machine, the whole base in each process."""

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if self.config is not None and self.num_processes == 1:
            raise GainLoRAError(f"launch.config: {self.config} is for several processes; raise launch.num_processes.")
        if self.config is not None and not Path(self.config).is_file():
            raise GainLoRAError(f"launch.config: {self.config}: no such file; name a configuration of accelerate.")
        return self


def _check_store(uri: str) -> str:
    """Refuse addresses that are not MLflow stores or hold a password, which would be versioned and logged."""
    try:
        parts = urlsplit(uri)
        secret = parts.password is not None or "password=" in parts.query.lower()
        secret = secret or (parts.scheme in ("http", "https") and "@" in parts.netloc)
    except ValueError:
        raise GainLoRAError("tracking.uri: no address; give sqlite:///FILE or http://HOST.") from None
    if secret:
        raise GainLoRAError(
            "tracking.uri: holds a user or password, and params.yaml is versioned; give them in the environment: "
            "MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD (a database's in ~/.pgpass or the like)."
        )
    if not re.fullmatch(r"(sqlite:///|https?://|(postgresql|mysql|mssql)(\+\w+)?://)[^\0]+", uri):
        hidden = re.sub("//[^/]*@", "//...@", uri)
        raise GainLoRAError(
            f"tracking.uri: {hidden!r}: no address of an MLflow store; give sqlite:///FILE or http://HOST."
        )
    return uri


class TrackingConfig(Section):
    """Where runs are recorded."""

    experiment: Text = "gainlora"
    """MLflow experiment."""
    uri: Annotated[str, AfterValidator(_check_store)] | None = None
    """MLflow store; null: mlruns/mlflow.db in the project's folder. It never holds a password."""


class ReportConfig(Section):
    """How results are shown."""

    decimals: int = Field(default=1, ge=0, le=6)
    """Of printed tables."""
    dpi: int = Field(default=150, ge=20, le=1200)
    """Of figures."""


class PromoteConfig(Section):
    """Promotion of finished runs to champion in the model registry."""

    max_forgetting: float | None = Field(default=5.0, ge=-100, le=100, allow_inf_nan=False)
    """Largest FT of a champion; null: any."""
    max_general_loss: float | None = Field(default=1.0, ge=-100, le=100, allow_inf_nan=False)
    """What a champion's loss on plain text may be above the base model's, in nats a token; null: any."""
    min_gain: float | None = Field(default=0.0, ge=-100, le=100, allow_inf_nan=False)
    """What the lower 95 % bound of a new task's gain over base model and majority label must exceed; null: any."""
