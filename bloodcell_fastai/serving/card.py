"""The model card of an export: a README with the metadata the Hugging Face Hub reads."""

from pathlib import Path
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import PretrainedCfg

from ..analysis.interpretation import read_metrics
from ..analysis.report import fit_command
from ..config import Config
from ..data.splits import leakage
from ..training.ready import READY, Source, ready_source
from ..training.runs import Run
from ..training.workflow import describe_leakage

TEMPLATE = Path(__file__).with_name("model_card.md")
HEADLINES = {  # of metrics.json: what the card calls them
    "accuracy": "Accuracy per image",
    "photo_accuracy": "Accuracy per photograph",
}


def model_card(run: Run, format: str, repo_id: str | None = None) -> str:
    """The card of a run's model: data, split, leakage, scores, limits and how to use it.

    It follows the model cards of Mitchell et al. (2019) and says of every score what it was
    measured on. Paths of this machine stay out of it.

    Args:
        run: a run with a model. Scores are those of its ``metrics.json``; without it the card
            says that the model was not evaluated.
        format: of the export, for the lines on how to use it.
        repo_id: where on the Hub it will be; the lines say so.

    Returns:
        Markdown with a YAML block.
    """
    config, table = run.config, run.table
    metrics = _metrics(run)
    name = repo_id.split("/")[1] if repo_id else run.name
    share = leakage(table)  # None if the photographs are not known
    source = ready_source(run.path)
    card = ModelCard.from_template(
        _metadata(config, metrics, format, name, source),
        template_path=str(TEMPLATE),
        name=name,
        config=config,
        format=format,
        address=f"hf-hub:{repo_id}" if repo_id else "local-dir:FOLDER",
        source=source,
        command=fit_command(config),
        dataset=_dataset_name(config),
        images={part: int(n) for part, n in table.part.value_counts().items()},
        photos={} if share is None else table.groupby("part").photo.nunique().to_dict(),
        leakage=describe_leakage(metrics["leakage"] if metrics else share),
        metrics=metrics,
        headlines=[(title, *_interval(metrics, key)) for key, title in HEADLINES.items()]
        if metrics
        else [],
        calibration=run.calibration,
        first_terms=_first_terms(config),
        epochs=len(run.history),
        figure=_figure,
    )
    return f"{card}\n"


def _metadata(
    config: Config, metrics: dict | None, format: str, name: str, source: Source | None
) -> ModelCardData:
    """The YAML block. It names no licence but that of a model which comes with the package: for
    others that is for whoever publishes the weights to say."""
    first = _first_weights(config)
    scores: dict[str, Any] = {}
    if metrics:
        scores = {
            "model_name": name,
            "eval_results": [
                EvalResult(
                    task_type="image-classification",
                    dataset_type="imagefolder",
                    dataset_name=f"{_dataset_name(config)}, split {config.split}",
                    dataset_split="validation",
                    metric_type="accuracy",
                    metric_name=title,
                    metric_value=round(metrics[key], 4),
                )
                for key, title in HEADLINES.items()
            ],
        }
    return ModelCardData(
        library_name="bloodcell-fastai" if format == "ready" else format,
        license=source.licence if source else None,
        pipeline_tag="image-classification",
        tags=["image-classification", "medical", "blood-cells", "bloodcell-fastai"],
        base_model=first.hf_hub_id if first else None,
        **scores,
    )


def _first_weights(config: Config) -> PretrainedCfg | None:
    """timm's own account of the ImageNet weights a run started from; None if it did not."""
    from_imagenet = config.weights_used == f"imagenet ({config.arch})"
    return timm.get_pretrained_cfg(config.arch) if from_imagenet else None


def _first_terms(config: Config) -> str:
    """Licence and images of the first weights, in brackets; empty if they are not known."""
    if first := _first_weights(config):
        return f" ({first.license}, trained on ImageNet)"
    if source := READY.get(config.weights_used.partition(" ")[0]):
        return f" ({source.licence}, trained on the images of {source.citation})"
    return ""


def _metrics(run: Run) -> dict | None:
    return read_metrics(run) if (run.path / "metrics.json").is_file() else None


def _dataset_name(config: Config) -> str:
    """The folder's name alone: the rest of its path is nobody's business."""
    return Path(config.data).name or "unnamed"


def _interval(metrics: dict, key: str) -> tuple[str, str, str]:
    low, high = metrics[f"{key}_ci95"]
    return f"{metrics[key]:.2%}", f"{low:.2%}", f"{high:.2%}"


def _figure(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
