"""`lavic register`: a bundle as a model in MLflow's registry."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import PositiveFloat, StringConstraints

from lavic.config import Reference, parse, settings
from lavic.config.secrets import redact, reveal
from lavic.errors import LaunchError
from lavic.tracking.settings import destination

DESCRIPTION = """Log a bundle with its item store as an MLflow model and register it. The model holds code and files,
nothing pickled; its tags name the base model, the adapters and the store. It belongs to the run that trained the
bundle, where MLflow has that run (`lavic sync`).

  lavic register --bundle runs/tune/bundle --store store --index index --name lavic-beauty
  mlflow models serve --env-manager local -m models:/lavic-beauty/1 -p 5001"""


@settings
class RegisterSettings:
    """A bundle as an MLflow model."""

    bundle: Path
    """The bundle that `lavic tune` made: RUN/bundle."""
    store: Path
    """The item store that it was tuned on, from `lavic embed`; it is copied."""
    index: Path | None = None
    """The retrieval index of the catalogue, from `lavic retrieve`, which is copied too. Without it requests must name
    candidates."""
    methods: tuple[str, ...] = ()
    """Methods of --index to search by. Default: all that take text."""
    weights: tuple[PositiveFloat, ...] = ()
    """Weight of each method's ranks in the fusion, in the order of `methods`; by default all count the same."""
    name: Annotated[str, StringConstraints(pattern=r"^[^/:]*[^/:\s][^/:]*$")]
    """Model name in the registry; must not contain / or :."""
    link_store: bool = False
    """Record where the store is rather than copy it, for one that is too large to copy."""
    base: Path | None = None
    """Folder of the base model, to be copied too; by default it is found by its recorded name."""
    uri: Annotated[str | None, Reference] = None
    """MLflow tracking URI; env:NAME or @FILE if it holds a password. Default: the store of the run that trained the
    bundle, else MLFLOW_TRACKING_URI, else mlflow.db beside the run's folder."""
    experiment: Annotated[str, StringConstraints(min_length=1)] = "lavic"
    """MLflow experiment of the model, if the training run is not in the store."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    chosen = parse(RegisterSettings, argv, command="register", description=DESCRIPTION)
    try:
        from lavic.recommend.mlflow_model import log_model
    except ModuleNotFoundError as error:
        raise LaunchError(f"{error.name} is not installed: pip install 'lavic[mlflow,retrieve]'") from None
    uri = reveal(chosen.uri or destination(chosen.bundle.resolve().parent), "--uri")
    model = log_model(
        chosen.bundle,
        chosen.store,
        chosen.index,
        uri=uri,
        experiment=chosen.experiment,
        registered_name=chosen.name,
        base=chosen.base,
        link_store=chosen.link_store,
        methods=chosen.methods,
        weights=chosen.weights,
    )
    print(f"{model}: registered as {chosen.name} at {redact(uri)}")
    return 0
