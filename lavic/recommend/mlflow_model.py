"""The recommender as an MLflow model: code and artifacts, nothing pickled.

MLflow runs a few lines of code that make a `RecommenderModel`, which loads the recommender from the model's artifacts:
the bundle, the item store and, where there is one, the retrieval index.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow.pyfunc import PythonModel

from lavic import __version__
from lavic.config.secrets import redact
from lavic.errors import DataError, LaunchError, LavicError, first_line
from lavic.model.bundle import BundleInfo
from lavic.storage.json_text import BadJson, parse_json
from lavic.tracking.mlflow_client import StoreClient, connect
from lavic.tracking.sync_record import read_records

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

_CODE = '''"""Loads the LaViC recommender from this model's artifacts."""

from mlflow.models import set_model

from lavic.recommend.mlflow_model import RecommenderModel

set_model(RecommenderModel())
'''

_NEEDED = "conversation: give `conversation`, a text, or `messages`, a list of role and content"
REQUIREMENTS = (f"lavic[retrieve]>={__version__}",)


class RecommenderModel(PythonModel):
    """Answers rows of `conversation` or `messages`, and optionally `candidates`."""

    def load_context(self, context: Any) -> None:
        """Loads the recommender from the artifacts, or the store from where the model's settings say it is."""
        from lavic.recommend.recommender import Recommender

        artifacts, settings = context.artifacts, context.model_config or {}
        self._recommender = Recommender.load(
            artifacts["bundle"],
            artifacts.get("store") or settings["store"],
            artifacts.get("index"),
            base=artifacts.get("base") or settings.get("base"),
            methods=settings.get("methods", ()),
            weights=settings.get("weights", ()),
        )

    # MLflow reads type hints of this method as the model's signature.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Answers each row: `{"items": [{"id", "title", "probability", "scores"}], "candidates", "none"}`.

        Args:
            context: Of MLflow.
            model_input: A DataFrame with the columns `conversation` (text) or `messages` (a list of `role` and
                `content`), and optionally `candidates` (item ids; where there are none the catalogue is searched).
            params: `k`, most items of an answer.

        Raises:
            MlflowException: A row cannot be answered; the server answers 400.
        """
        from mlflow.exceptions import MlflowException

        from lavic.recommend.recommendation import Query

        k = 10 if (chosen := (params or {}).get("k")) is None else int(chosen)
        try:
            if not {"conversation", "messages"} & set(model_input.columns):
                # MLflow drops columns that the signature does not have, and with the last one the rows.
                raise DataError(_NEEDED)
            queries = [
                Query(conversation=_conversation(row), candidates=_list(row.get("candidates")), k=k)
                for row in model_input.to_dict("records")
            ]
            answers = self._recommender.recommend_batch(queries)
        except LavicError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        return [
            {
                "items": [
                    {
                        "id": recommendation.id,
                        "title": recommendation.title,
                        "probability": recommendation.probability,
                        "scores": dict(recommendation.scores),
                    }
                    for recommendation in answer
                ],
                "candidates": answer.candidates,
                "none": answer.none,
            }
            for answer in answers
        ]


def signature() -> ModelSignature:
    """What the model takes and gives."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array, Map, Object, Property

    message = Object([Property("role", DataType.string), Property("content", DataType.string)])
    scored = Object(
        [
            Property("id", DataType.string),
            Property("title", DataType.string),
            Property("probability", DataType.double),
            Property("scores", Map(DataType.double)),
        ]
    )
    return ModelSignature(
        inputs=Schema(
            [
                ColSpec(DataType.string, "conversation", required=False),
                ColSpec(Array(message), "messages", required=False),
                ColSpec(Array(DataType.string), "candidates", required=False),
            ]
        ),
        outputs=Schema(
            [
                ColSpec(Array(scored), "items"),
                ColSpec(DataType.long, "candidates"),
                ColSpec(DataType.double, "none", required=False),
            ]
        ),
        params=ParamSchema([ParamSpec("k", DataType.long, 10)]),
    )


def log_model(
    bundle: str | Path,
    store: str | Path,
    index: str | Path | None = None,
    *,
    uri: str,
    experiment: str = "lavic",
    registered_name: str | None = None,
    base: str | Path | None = None,
    link_store: bool = False,
    methods: Sequence[str] = (),
    weights: Sequence[float] = (),
) -> str:
    """Logs a bundle with its store as an MLflow model, and registers it; returns the model's URI.

    The model belongs to the run that trained the bundle, where the tracking store has that run (`lavic sync`), else to
    a run of its own. Tags name what it was made from: `lavic.base`, `lavic.fingerprint`, `lavic.vision_adapter`,
    `lavic.language_adapter`, `lavic.store`.

    Args:
        bundle: The bundle: RUN/bundle.
        store: The item store that it was tuned on.
        index: The retrieval index; without it requests must name candidates.
        uri: MLflow tracking URI.
        experiment: Of a run of its own.
        registered_name: Name in the model registry; None registers nothing.
        base: Folder of the base model, to be copied too; None: it is found by the name that the bundle records.
        link_store: Record where the store is rather than copy it, for one that is too large to copy.
        methods: Of the index, to search by; by default all that take text.
        weights: Of each method's ranks in the fusion, in the order of `methods`.

    Raises:
        ConfigError: The index has no such method, or `base` is no model.
        DataError: Bundle, store, index and base do not belong together.
        LaunchError: mlflow is not installed, or refuses the URI or the model.
    """
    client = connect(uri)
    import mlflow

    from lavic.model.item_store import ItemStore
    from lavic.recommend.candidates import CandidateSearch

    bundle, store = Path(bundle), Path(store)
    info, opened = BundleInfo.read(bundle), ItemStore.open(store)
    info.check_adapters(bundle)
    info.check_store(opened)
    if info.language_adapter is None:
        raise DataError(f"{bundle}: a stage-1 bundle cannot recommend: run `lavic tune` first")
    settings: dict[str, Any] = {"store": str(store.absolute())} if link_store else {}
    if base is not None:
        info.base_model(bundle, str(base))
    if index is not None:
        CandidateSearch.open(Path(index), opened, methods, weights)
        settings |= {"methods": list(methods), "weights": list(weights)}
    folders = {"bundle": bundle, "index": index, "base": base, "store": None if link_store else store}
    tags = lineage(info, opened.manifest.digest)
    if not len(opened):
        raise DataError(f"{store}: an item store without items")
    example = {"conversation": "a warm hat for winter", "candidates": list(opened.ids[: min(10, len(opened))])}
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    run_id = training_run(bundle, uri)
    if run_id is None:
        with _refusals_in_one_line(uri):
            mlflow.set_experiment(experiment_id=StoreClient(uri).experiment_id(experiment))
    with (
        _refusals_in_one_line(uri),
        tempfile.TemporaryDirectory() as folder,
        mlflow.start_run(run_id=run_id, run_name=None if run_id else "model"),
    ):
        code = Path(folder) / "lavic_model.py"
        code.write_text(_CODE, "utf-8")
        model = mlflow.pyfunc.log_model(
            name="recommender",
            python_model=str(code),
            artifacts={name: str(Path(path).absolute()) for name, path in folders.items() if path is not None},
            model_config=settings or None,
            signature=signature(),
            input_example=[example],
            pip_requirements=list(REQUIREMENTS),
            registered_model_name=registered_name,
            metadata=tags,
            tags=tags,
        )
        mlflow.set_tags(tags)
    if registered_name and model.registered_model_version is not None:
        for key, value in tags.items():
            client.set_model_version_tag(registered_name, str(model.registered_model_version), key, value)
    return str(model.model_uri)


@contextmanager
def _refusals_in_one_line(uri: str) -> Iterator[None]:
    """Raises LaunchError for what MLflow raises."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise LaunchError(f"MLflow at {redact(uri)}: {redact(first_line(error))[:300]}") from None


def lineage(info: BundleInfo, store_digest: str) -> dict[str, str]:
    """What a model was made from, as tags."""
    values = {
        "lavic.version": __version__,
        "lavic.base": info.base,
        "lavic.fingerprint": info.fingerprint,
        "lavic.vision_adapter": info.vision_adapter,
        "lavic.language_adapter": info.language_adapter,
        "lavic.prompt_version": info.prompt_version,
        "lavic.store": store_digest,
    }
    return {key: value for key, value in values.items() if value is not None}


def training_run(bundle: Path, uri: str) -> str | None:
    """MLflow's id of the run that trained a bundle; None where the store does not have it."""
    from lavic.tracking.mlflow_store import store_key

    record = read_records(bundle.resolve().parent).get(store_key(uri))
    return record.run_id or None if record else None


def _conversation(row: Mapping[str, Any]) -> Any:
    """The conversation of a row: `messages` where there are any, else `conversation`, which may be their JSON."""
    if messages := _list(row.get("messages")):
        return [dict(message) for message in messages]
    text = row.get("conversation")
    if not isinstance(text, str):
        raise DataError(_NEEDED)
    if text.lstrip().startswith("["):
        try:
            return parse_json(text)
        except BadJson:
            return text  # words in brackets
    return text


def _list(value: Any) -> list[Any] | None:
    """A list of a DataFrame's cell, which may be an array; None where the cell or the list is empty."""
    if value is None or isinstance(value, float):
        return None
    return list(value) or None
