"""The model card of an export: a README with the metadata the Hugging Face Hub reads."""

from pathlib import Path

import timm
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import PretrainedCfg

from ..config import ResolvedConfig
from ..data.splits import count_known, describe_leakage, leakage, photo_groups
from ..errors import printable
from ..evaluation.interpretation import read_metrics
from ..evaluation.report import reproduce_command
from ..model.pretrained import PRETRAINED, pretrained_source
from ..model.runs import Run

TEMPLATE = Path(__file__).with_name("model_card.md")
HEADLINES = {  # of metrics.json: what the card calls them
    "accuracy": "Accuracy per image",
    "photo_accuracy": "Accuracy per photograph",
}


def model_card(run: Run, format: str, repo_id: str | None = None) -> str:
    """The card of a run's model: data, split, leakage, metrics, limits and how to use it.

    It follows the model cards of Mitchell et al. (2019) and says of every metric what it was
    measured on. Paths of this machine stay out of it.

    Args:
        run: a run with a model. Metrics are those of its ``metrics.json``; without it the card
            says that the model was not evaluated.
        format: of the export, for the section on how to use it.
        repo_id: where on the Hub it will be; the section says so.

    Returns:
        Markdown with a YAML block.

    Raises:
        BloodcellError: a file of the run is missing or damaged.
    """
    config, table = run.config, run.table[run.table.part.isin(["train", "valid"])]
    metrics = read_metrics(run) if (run.path / "metrics.json").is_file() else {}
    # Of unknown photographs both rows would be the same.
    headlines = HEADLINES if metrics.get("n_known") else {"accuracy": HEADLINES["accuracy"]}
    n_known = count_known(table)
    source = pretrained_source(run.path)
    name = repo_id.split("/")[1] if repo_id else run.name
    initial = _imagenet_weights(config)
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type="imagefolder",
            dataset_name=f"{Path(config.data).name}, split {config.split}",
            dataset_split="validation",
            metric_type="accuracy",
            metric_name=title,
            metric_value=round(metrics[key], 4),
        )
        for key, title in headlines.items()
        if metrics
    ]
    data = ModelCardData(
        library_name="bloodcell-fastai" if format == "bundle" else format,
        # Of other weights it is for whoever publishes them to say.
        license=source.licence if source else None,
        pipeline_tag="image-classification",
        tags=["image-classification", "medical", "blood-cells", "bloodcell-fastai"],
        base_model=initial.hf_hub_id if initial else None,
        eval_results=results or None,
        model_name=name if results else None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        config=config,
        format=format,
        address=f"hf-hub:{repo_id}" if repo_id else "local-dir:FOLDER",
        source=source,
        command=reproduce_command(run),
        dataset=Path(config.data).name,
        images=table.part.value_counts().to_dict(),
        photos=photo_groups(table).groupby(table.part).nunique().to_dict() if n_known else {},
        leakage=describe_leakage(leakage(table), n_known, len(table)),
        metrics=metrics,
        headlines=headlines,
        in_table=_in_table,
        calibration=run.calibration,
        initial_terms=_initial_terms(config),
        epochs=len(run.history),
    )
    return f"{card}\n"


def _in_table(name: str) -> str:
    """The name of a class, which may hold anything, in a cell of a Markdown table."""
    return printable(name).replace("\n", " ").replace("|", "\\|")


def _imagenet_weights(config: ResolvedConfig) -> PretrainedCfg | None:
    """timm's description of the ImageNet weights a run started from; None if it did not."""
    from_imagenet = config.initial_weights == f"imagenet ({config.arch})"
    return timm.get_pretrained_cfg(config.arch) if from_imagenet else None


def _initial_terms(config: ResolvedConfig) -> str:
    """Licence and images of the initial weights, in brackets; empty if they are not known."""
    if initial := _imagenet_weights(config):
        return f" ({initial.license}, trained on ImageNet)"
    if source := PRETRAINED.get(config.initial_weights.partition(" ")[0]):
        return f" ({source.licence}, trained on the images of {source.citation})"
    return ""
