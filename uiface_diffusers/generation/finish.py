"""What a data set gets when all of its images are there: metadata, bank, preview and card."""

import os
import shutil

from diffusers.utils import make_image_grid

from ..data.image_folder import JOURNAL, METADATA, read_rows, write_metadata
from ..files import complete_file
from ..hub.lineage import CARD, read_header
from ..identities import IDENTITIES, IdentityBank
from .card import dataset_card, dataset_header
from .plan import ImageKey
from .resume import lock
from .settings import GenerationSettings
from .writers import ImageFolder

# of the preview
GRID_ROWS, GRID_COLUMNS = 8, 8


def finish_dataset(
    settings: GenerationSettings, bank: IdentityBank, writer: ImageFolder, model: str | os.PathLike | None
) -> tuple[bool, bool]:
    """Metadata, bank, preview and card, once all parts are complete; says whether they are, and whether this call
    wrote them. What the header of a card that is there says stays.

    Args:
        model: folder or Hub repository of the pipeline, for the card.
    """
    output, keys = writer.output, writer.plan.keys
    with lock(output, "finish", timeout=-1):
        rows = read_rows(output)
        if not all(writer.is_finished(key, rows.get(key)) for key in keys):
            return False, False
        if not (output / JOURNAL).exists() and (output / METADATA).exists():
            return True, False
        ordered = [rows[key] for key in keys]
        write_metadata(output, ordered, [writer.file_name(key) for key in keys])
        bank.save(output / IDENTITIES)
        _write_preview(writer)
        header = dataset_header(settings, len(ordered), bank, model)
        card = dataset_card(settings, ordered, header, kept=read_header(output / CARD))
        with complete_file(output / CARD) as beside:
            beside.write_text(card, encoding="utf-8")
        writer.clean_up()
        shutil.rmtree(output / JOURNAL)
    return True, True


def _write_preview(writer: ImageFolder) -> None:
    """The first images of the first identities, in rows."""
    columns = min(GRID_COLUMNS, writer.plan.images_per_identity)
    names = writer.plan.names[:GRID_ROWS]
    cells = [writer.open(ImageKey(name, index)) for name in names for index in range(columns)]
    with complete_file(writer.output / "preview.png") as beside:
        make_image_grid(cells, rows=len(names), cols=columns).save(beside, "png")
