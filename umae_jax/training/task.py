"""The interface between the training loop (`run.py`) and the tasks that it trains (`umae_jax/tasks/`)."""

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from umae_jax.data.pipeline import Groups, Sample
from umae_jax.data.sources import Source
from umae_jax.errors import UserError
from umae_jax.files import AnyPath
from umae_jax.models.build import build_model
from umae_jax.weights.names import to_reference
from umae_jax.weights.stored_run import StoredRun

IMAGENET_IMAGES = 1_281_167  # ImageNet-1K's training set

Batch = dict[str, Any]  # arrays [B, ...], sharded over their first axis
Params = Any  # a pytree of float32 arrays
Prediction = tuple[str, dict[str, Any]]  # a summary in one line, and the same values by name


class Hook(NamedTuple):
    """An action between steps, such as an evaluation or a picture.

    Attributes:
        every: interval in steps; the hook also runs before the first and after the last step. 0: never.
        run: (step, parameters) -> metrics to report; may raise PreemptionRequested.
        metric: name of one of these metrics. A resumed run skips the hook at its first step if this is logged.
    """

    every: int
    run: Callable[[int, Params], dict[str, float]]
    metric: str = ""


class RunContext(NamedTuple):
    """The parts of a run that hooks use.

    Attributes:
        graph: the model without its parameters; `nnx.merge(graph, params)` gives the model.
        params: shapes, dtypes and shardings of the parameters.
        mesh: the devices.
        workdir: the run's directory.
        total_steps: of the run.
        show: (step, name, PNG) -> None; writes DIR/NAME/STEP.png, and shows it in TensorBoard and the tracker. All
            processes may call it, process 0 writes.
        check: raises PreemptionRequested if the run should save and exit; long evaluations call it per batch.
    """

    graph: nnx.GraphDef
    params: Params
    mesh: Mesh
    workdir: AnyPath
    total_steps: int
    show: Callable[[int, str, bytes], None]
    check: Callable[[], None]


class BaseTask(abc.ABC):
    """Base class of tasks. A configuration alone is enough to create a task; `open` adds the data.

    Attributes:
        command: command that trains the task.
        best_metric: metric whose highest value selects the best checkpoint; None: keep no best checkpoint.
        accuracies: metrics of evaluations, in [0, 1], that the picture of the loss shows.
        measured_last: `Hook.metric` that a complete run has logged at its last step, set by `prepare`; None: none.
        group_size: number of neighbouring samples that gradient accumulation keeps in one microbatch.
        frozen: prefixes of the names of parameters that keep their values; the loss must give them zero gradients.
        source: the training data, set by `open`.
        config: the configuration; `open` may complete it from the data.
        class_names: names of the classes of the training data; () without classes.
    """

    command: ClassVar[str]
    best_metric: ClassVar[str | None] = None
    accuracies: ClassVar[tuple[str, ...]] = ()
    group_size: int = 1
    frozen: tuple[str, ...] = ()
    measured_last: str | None = None
    source: Source

    def __init__(self, config: ConfigDict) -> None:
        self.config = config
        self.class_names: tuple[str, ...] = ()

    # Without data: for the training step, and for plans.

    @abc.abstractmethod
    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return shape and dtype of each array of a sample, without the batch axis; the largest if shapes differ.

        The loader adds "sample_index", uint32 [], the key of every random draw of the sample.
        """

    @abc.abstractmethod
    def loss(self, model: Any, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:  # noqa: ANN401
        """Compute the mean loss of a batch, a float32 scalar, and further scalars to report by name."""

    def batches(self) -> Sequence[dict[str, jax.ShapeDtypeStruct]]:
        """Return `batch` for every shape that batches have; a run compiles one program for each."""
        return (self.batch(),)

    def build_model(self, rngs: nnx.Rngs) -> nnx.Module:
        """Build the model, freshly initialised.

        Raises:
            UserError: if the numbers of the configuration do not fit together.
        """
        return build_model(self.config, rngs)

    def layer_index(self, model: Any, name: str) -> tuple[int, int]:  # noqa: ANN401
        """Return the layer of a parameter, counted from 0 at the input, and the number of the last layer.

        Args:
            model: from `build_model`, in shapes.
            name: dotted path of the parameter.

        Raises:
            ValueError: for an unknown name.
        """
        return model.layer_index(name), model.num_layers

    def assume_data(self) -> int:
        """Complete the configuration for a plan without the data set; return the number of training images."""
        return IMAGENET_IMAGES

    # With data, for a training run.

    def resume(self, stored: ConfigDict) -> None:  # noqa: B027 - most tasks have nothing to keep
        """Take over what a run that continues must keep from the configuration it has stored; called before `open`."""

    @abc.abstractmethod
    def open(self) -> None:
        """Open the training data, check them against the configuration, and complete the configuration from them.

        Raises:
            MissingDataError: if the data do not exist.
            UserError: naming the key and what to write.
        """

    def prepare(self) -> None:  # noqa: B027 - not every task has validation data
        """Open further data that only a training run needs, such as validation data; called after `open`.

        Raises:
            UserError: naming the key and what to write.
        """

    @property
    def groups(self) -> Groups | None:
        """Groups of the training records, of which a batch holds only one; None: a batch may hold any records."""
        return None

    @property
    def num_samples(self) -> int:
        """Number of training samples per epoch."""
        return len(self.source) if self.groups is None else self.groups.samples_per_epoch()

    @property
    def data_digest(self) -> str:
        """Digest of the names of the training images, "" if they have none: a run that continues compares it."""
        return getattr(getattr(self, "source", None), "digest", "")  # tasks of other packages may lack either

    def overview(self) -> dict[str, str]:
        """Return rows of the table that a run prints before its first step, beside those of every task."""
        return {}

    @abc.abstractmethod
    def sample_loader(self) -> Callable[[int, int], Sample]:
        """Return the picklable function that loads one training sample on the host, in a thread or a worker.

        It maps (global sample index, record index) to arrays as `batch` states them.
        """

    def initial_params(self, abstract: Params) -> Params | None:
        """Return initial values, on the host, for all or some parameters of `abstract`; None: initialise all at random.

        Raises:
            UserError: if the weights that the configuration names do not fit.
        """
        return None

    def hooks(self, context: RunContext) -> Sequence[Hook]:
        """Return the evaluations and pictures of a run."""
        return ()

    def stop_reason(self, scores: Mapping[int, float]) -> str | None:
        """Return why the run ends now, before its last step; None: it goes on.

        Args:
            scores: `best_metric` by step, up to now, ascending. The last one was measured at this step.
        """
        return None

    def result(self, workdir: AnyPath) -> str | None:
        """Return the line to print at the end of a run, such as the path of its last picture."""
        return None

    def pictures(self, workdir: AnyPath) -> dict[str, bytes]:
        """Return pictures of the whole run up to now, PNG by file name; process 0 calls it at the end."""
        return {}

    def next_steps(self, workdir: AnyPath) -> dict[str, str]:
        """Return commands to go on with after the run, each by its purpose."""
        return {}

    # With a stored run: the command `evaluate`.

    def evaluate(self, run: StoredRun, mesh: Mesh, batch_size: int) -> Prediction:
        """Evaluate a stored run on its validation data.

        Raises:
            UserError: if the task has no evaluation of its own.
        """
        raise UserError(f"model.method: {self.config.model.method} is evaluated by a probe; choose knn or linear")

    def state_dict(self, params: Params) -> dict[str, np.ndarray]:
        """Return the tensors of a weight file by their names, float32; `params` are on the host."""
        return to_reference(self.config, params)

    def predict(
        self, run: StoredRun, path: Path, mesh: Mesh, batch_size: int, output: AnyPath | None
    ) -> Iterator[Prediction]:
        """Predict for an image file or each image of a folder.

        Args:
            run: its parameters are replicated on the mesh.
            path: of the images.
            mesh: the devices.
            batch_size: global.
            output: file or folder to write to, as the task needs it; None: its default, or the terminal alone.

        Raises:
            UserError: if the task has no predictions for images.
        """
        raise UserError(f"model.method: {self.config.model.method} has no predictions for images; fine-tune it first")
