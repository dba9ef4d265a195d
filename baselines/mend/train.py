"""Train MEND's editor for a model and save it where `--alg_name=MEND` looks for it.

    python -m baselines.mend.train                            the embedded model on the starter set
    python -m baselines.mend.train model_name=./Qwen2.5-7B-Instruct hparams_fname=Qwen2.5-7B.json ds_name=mcf \\
        first_record=5000

The configuration is Hydra's: baselines/mend/config.yaml, every entry of which can be given as key=value.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from sphere.commands.common import make_parser, run_cli
from sphere.errors import SphereError, first_line


def configuration(overrides: list[str]) -> dict[str, Any]:
    """config.yaml with overrides, as plain values.

    Raises:
        SphereError: an override that is no key of it, or no value for it.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    with initialize_config_dir(str(Path(__file__).parent.resolve()), version_base=None):
        try:
            config = OmegaConf.to_container(compose("config", overrides), resolve=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise SphereError(
                f"{first_line(error)} Give entries of baselines/mend/config.yaml as key=value, e.g. training.steps=100."
            ) from error
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def train(config: dict[str, Any]) -> Path:
    """Load the model and the records, train, save; returns the editor's file."""
    from sphere.data.records import load_records
    from sphere.hparams import hparams_from_dict
    from sphere.methods.edited_model import EditedModel
    from sphere.models import load_model, model_label
    from sphere.runs.config import RunConfig
    from sphere.runs.hparams import hparams_of

    from .method import MendHParams, editor_path
    from .training import TrainingSettings, train_editor

    label = model_label(config["model_name"])
    names = ("model_name", "hparams_fname", "hparams_dir")
    hparams = hparams_of(RunConfig(alg_name="MEND", **{name: config[name] for name in names}))
    assert isinstance(hparams, MendHParams)
    if not isinstance(config["training"], dict):
        raise SphereError(f"'training' must be a section of the configuration, got {config['training']!r}.")
    try:
        settings = hparams_from_dict(config["training"], TrainingSettings)
    except SphereError as error:
        raise SphereError(f"In the section 'training' of the configuration: {error}") from error
    first, limit = config["first_record"], config["dataset_size_limit"]
    records = load_records(config["ds_name"], config["data_dir"], None if limit is None else first + limit)[
        first:
    ]
    if not records:
        raise SphereError(f"{config['ds_name']} has no record {first} or later: give a smaller first_record.")
    model, tokenizer = load_model(config["model_name"], config["device"], config["dtype"])
    start = time.perf_counter()
    trained = train_editor(EditedModel(model, tokenizer, hparams), hparams, records, settings)
    path = editor_path(hparams, Path(config["stats_dir"]), label)
    about = {"configuration": config, "seconds": time.perf_counter() - start, "curve": trained.curve}
    trained.editor.save(path, about)
    return path


def main(argv: list[str] | None = None) -> int:
    """Parse, train, say where the editor is."""
    parser = make_parser(__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="entries of the configuration")
    path = train(configuration(parser.parse_args(argv).overrides))
    print(f"Editor: {path}")
    return 0


if __name__ == "__main__":
    run_cli(main)
