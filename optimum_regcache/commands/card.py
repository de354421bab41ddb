"""What `quantize` writes into the model card."""

from __future__ import annotations

from optimum_regcache.commands.report import Row, markdown_table
from optimum_regcache.commands.sources import EMBEDDED_IMAGES, Source
from optimum_regcache.config.recipe import LOCAL
from optimum_regcache.hub.card import Measured


def measured(source: Source, rows: list[Row]) -> Measured:
    """The report for the card; the last row is the saved model."""
    last, embedded = rows[-1], source.dataset_name.endswith(EMBEDDED_IMAGES)
    figures = {} if last.accuracy is None else {"accuracy": last.accuracy}
    return Measured(
        markdown_table(rows),
        {**figures, "cosine_similarity": last.cosine},
        len(source.report_images),
        source.images_title.removesuffix(EMBEDDED_IMAGES) + (" scenes" if embedded else ""),
        None if embedded or source.dataset_name.startswith(LOCAL) else source.dataset_name,
        "report" if embedded else str(getattr(source.report_images, "split", None) or "") or None,
    )
