"""Faces in the browser, by Gradio: identities, seeds, boundary, injection and guidance to play with.

Nothing leaves the machine: the server listens on 127.0.0.1 by default, without a share link and without analytics. A
photograph is deleted once its embedding is made; pictures are part of the page and no files.
"""

import base64
import html
import importlib
import io
import os
import random
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch

from .faces import CarriedEncoder, PhotographEncoder, load_photograph
from .identities import IdentityBank
from .pipeline_uiface import UIFacePipeline
from .seeds import image_generator
from .two_stage.boundary import RULES, AttentionAtRest, BoundaryRule, FixedTimestep, SingleStage

if TYPE_CHECKING:
    import gradio

MOST_FACES = 16
PHOTOGRAPH = "photograph"
MAX_UPLOAD = "20mb"
ADAPTIVE, FIXED, SINGLE = AttentionAtRest.label, FixedTimestep.label, SingleStage.label
# of an attention map: from no to all attention
COLORS = np.array([[12, 12, 40], [120, 28, 109], [237, 105, 37], [252, 255, 164]])
STYLE = """
.uiface-faces { display: grid; grid-template-columns: repeat(8, 1fr); gap: 10px; }
@media (max-width: 900px) { .uiface-faces { grid-template-columns: repeat(4, 1fr); gap: 6px; } }
.uiface-faces figure { margin: 0; }
.uiface-faces img { display: block; width: 100%; aspect-ratio: 1; border-radius: 4px; }
.uiface-faces img.map { margin-top: 4px; }
.uiface-faces figcaption { font-size: 13px; line-height: 1.3; margin-top: 2px; }
.uiface-title { font-weight: 600; margin: 14px 0 6px; }
"""
# on a telephone, the faces are below the settings
TO_THE_FACES = "() => { if (innerWidth < 700) document.getElementById('faces').scrollIntoView(); }"


@dataclass
class Sampled:
    """
    Args:
        images (`list[PIL.Image.Image]`).
        boundaries (`list[int]`): each sample's boundary timestep; -1 for none.
        maps (`list[np.ndarray | None]`): the last attention map of each sample before its boundary, `(32, 32)` in
            [0, 1]; None where the boundary is not found by attention.
    """

    images: list[PIL.Image.Image]
    boundaries: list[int]
    maps: list[np.ndarray | None]


def sample_faces(
    pipeline: UIFacePipeline,
    identity: IdentityBank,
    number: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda step, steps: None,
    **sampling: Any,
) -> Sampled:
    """Images 0 to `number` - 1 of an identity, from the same noise as those of `generate_dataset`.

    Args:
        pipeline: of the faces.
        identity: a bank of one.
        number (`int`): of images.
        seed (`int`): of a data set.
        progress: is called with the steps done and the steps in all.
        sampling: of the pipeline's call.

    Raises:
        ValueError: an argument of the pipeline's call is not usable.
    """
    maps: list[np.ndarray | None] = [None] * number

    def after_step(pipe: UIFacePipeline, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        progress(step + 1, pipe.num_timesteps)
        if tensors["attention_maps"] is not None:
            for sample, each in enumerate(tensors["attention_maps"].float().cpu().numpy()):
                if np.isfinite(each).all():
                    maps[sample] = each
        return {}

    out = pipeline(
        identity,
        num_images_per_prompt=number,
        generator=[image_generator(seed, identity.names[0], index) for index in range(number)],
        callback_on_step_end=after_step,
        callback_on_step_end_tensor_inputs=["attention_maps"],
        **sampling,
    )
    return Sampled(out.images, out.boundary_timesteps.tolist(), maps)


def color_map(attention: np.ndarray) -> PIL.Image.Image:
    """An attention map `(32, 32)` in [0, 1] in colors."""
    places = np.linspace(0, 1, len(COLORS))
    channels = [np.interp(attention, places, COLORS[:, channel]) for channel in range(3)]
    return PIL.Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def _image(picture: PIL.Image.Image, text: str, kind: str = "") -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class="{kind}" alt="{html.escape(text)}" src="data:image/png;base64,{data}">'


def faces_html(title: str, sampled: Sampled, with_boundaries: bool = True, with_maps: bool = False) -> str:
    """Faces as a part of a page, with their boundaries, and with the attention maps below them."""
    cells = []
    for index, (image, boundary, attention) in enumerate(
        zip(sampled.images, sampled.boundaries, sampled.maps, strict=True)
    ):
        cell = _image(image, f"face {index}")
        if with_maps and attention is not None:
            cell += _image(color_map(attention).resize((128, 128)), f"attention map of face {index}", "map")
        where = f"boundary {boundary}" if boundary >= 0 else "no boundary"
        caption = f"face {index}" + (f"<br>{where}" if with_boundaries else "")
        cells.append(f"<figure>{cell}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="uiface-title">{html.escape(title)}</div><div class="uiface-faces">{"".join(cells)}</div>'


def _rule(label: str) -> type[BoundaryRule]:
    """The rule of one of the demo's choices."""
    return next(rule for rule in RULES if rule.label == label)


class Demo:
    """What the page's buttons do.

    Args:
        pipeline: of the faces.
        bank: identities to choose from.
        encoder (*optional*): for photographs.

    Raises:
        ValueError: the bank or the encoder is of another encoder than the pipeline's.
    """

    def __init__(self, pipeline: UIFacePipeline, bank: IdentityBank, encoder: PhotographEncoder | None = None):
        self.pipeline, self.bank, self.encoder = pipeline, bank, encoder
        pipeline.check_encoder("the bank", bank.encoder_mark)
        if encoder is not None:
            pipeline.check_encoder(f"`{encoder.name}`", encoder.encoder_mark)
        # of a name with several embeddings, the first one
        self.positions = {name: position for position, name in reversed(list(enumerate(bank.names)))}
        pipeline.set_progress_bar_config(disable=True)
        self._making, self._stopped = threading.Lock(), False

    def stop(self) -> None:
        """Ends what is being made, and waits for that: a process that exits while a thread computes is aborted."""
        self._stopped = True
        with self._making:
            pass

    def draw(self) -> str:
        """Name of any identity in the bank."""
        return random.choice(self.bank.names)

    def embed(self, file: str, aligned: bool) -> IdentityBank:
        """The identity on a photograph.

        Raises:
            OSError: it cannot be read.
            ValueError: it has no face.
        """
        assert self.encoder is not None
        return replace(self.encoder.embed(load_photograph(file), aligned=aligned), names=[PHOTOGRAPH])

    def identity(self, name: str) -> IdentityBank:
        """One of the bank.

        Raises:
            ValueError: the bank has none of this name.
        """
        if name not in self.positions:
            raise ValueError(
                f"the bank has no identity {name!r}: its {len(self.bank)} begin with {self.bank.names[0]}."
            )
        return self.bank.take([self.positions[name]])

    def make(
        self,
        identity: IdentityBank,
        number: int,
        seed: int,
        steps: int,
        guidance_scale: float,
        boundary: str,
        timestep: int,
        injection: str,
        beside: bool,
        with_maps: bool,
        *,
        progress: Callable[[float, str], None] = lambda share, text: None,
    ) -> str:
        """The faces as a part of a page. `boundary` is the label of a rule; `beside` adds the single stage from the
        same noise."""
        two_stages: dict[str, Any] = {
            "boundary": timestep if _rule(boundary).takes_timestep else _rule(boundary).word,
            "injection": None if injection == "none" else injection,
        }
        title = f"{identity.names[0]}: " + ("single stage" if boundary == SINGLE else "two stages")
        parts = [(title, two_stages)]
        if beside and boundary != SINGLE:
            parts.append((f"{identity.names[0]}: single stage, from the same noise", {"boundary": None}))
        page = f"<style>{STYLE}</style>"
        for part, (title, options) in enumerate(parts):

            def after_step(step: int, total: int, part: int = part, title: str = title) -> None:
                if self._stopped:
                    raise RuntimeError("the demo was ended.")
                progress((part + step / total) / len(parts), title)

            shared = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
            with self._making:
                sampled = sample_faces(self.pipeline, identity, number, seed, after_step, **shared, **options)
            page += faces_html(title, sampled, options["boundary"] is not None, with_maps)
        return page


def load_gradio() -> ModuleType:
    """Gradio, without its analytics.

    Raises:
        ImportError: it is not installed.
    """
    # before Gradio is loaded
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        return importlib.import_module("gradio")
    except ImportError as error:
        raise ImportError(f'the demo needs Gradio: pip install "uiface-diffusers[demo]" ({error})') from error


def build_page(demo: Demo) -> "gradio.Blocks":
    """The page, to be launched.

    Raises:
        ImportError: Gradio is not installed.
    """
    gr: Any = load_gradio()

    def make(name: str, photograph: Any, *settings: Any, progress: Any = gr.Progress()) -> str:  # noqa: B008 - Gradio's way
        try:
            identity = demo.identity(name) if photograph is None else photograph
            return demo.make(identity, *settings, progress=lambda share, text: progress(share, desc=text))
        except (ValueError, OSError) as error:
            raise gr.Error(str(error)) from error

    def embed(file: str | None, aligned: bool) -> tuple[None, IdentityBank | None, str]:
        if file is None:
            return None, None, ""
        try:
            found = demo.embed(file, aligned)
        except (ValueError, OSError) as error:
            raise gr.Error(str(error)) from error
        finally:
            Path(file).unlink(missing_ok=True)
        return None, found, "Faces follow the photograph, which was deleted. Choose an identity to leave it."

    defaults = demo.pipeline.default_sampling()
    # uploads that never come to `embed`, such as files that are no pictures, are deleted within minutes
    with gr.Blocks(title="uiface demo", analytics_enabled=False, fill_width=True, delete_cache=(60, 120)) as page:
        gr.Markdown("## Faces by two-stage diffusion\nThe people do not exist, unless you give a photograph.")
        photograph = gr.State(None)
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                name = gr.Dropdown(
                    demo.bank.names[:1000], value=demo.bank.names[0], label="Identity", allow_custom_value=True
                )
                draw = gr.Button("Draw an identity", size="sm")
                note = gr.Markdown("")
                if demo.encoder is not None:
                    # without a mode of its own, Gradio hands over the uploaded file itself and makes no copy
                    upload = gr.Image(
                        type="filepath", sources=["upload"], image_mode=None, label="Photograph", height=160
                    )
                    only_aligned = isinstance(demo.encoder, CarriedEncoder) and demo.encoder.detector is None
                    text = "The photograph is an aligned face"
                    text += " (others need --detector PACK)" if only_aligned else ""
                    aligned = gr.Checkbox(only_aligned, label=text, interactive=not only_aligned)
                    upload.upload(embed, [upload, aligned], [upload, photograph, note], api_visibility="private")
                number = gr.Slider(1, MOST_FACES, 8, step=1, label="Faces")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**53)
                button = gr.Button("Make faces", variant="primary")
                boundary = gr.Radio([rule.label for rule in RULES], value=ADAPTIVE, label="Boundary")
                timestep = gr.Slider(0, 1000, 500, step=10, label="Timestep of the boundary", visible=False)
                injection = gr.Radio(["both", "self", "cross", "none"], value="both", label="Injected attention")
                guidance = gr.Slider(1, 6, defaults["guidance_scale"], step=0.1, label="Guidance scale")
                steps = gr.Slider(5, 100, 30, step=1, label="Steps")
                beside = gr.Checkbox(True, label="Single stage beside two stages")
                maps = gr.Checkbox(False, label="Attention maps at the boundary")
            with gr.Column(scale=3, min_width=320):
                faces = gr.HTML("Press “Make faces”.", elem_id="faces")
        boundary.change(
            lambda chosen: gr.update(visible=_rule(chosen).takes_timestep),
            boundary,
            timestep,
            api_visibility="private",
        )
        draw.click(demo.draw, None, name, api_visibility="private")
        name.change(lambda: (None, ""), None, [photograph, note], api_visibility="private")
        settings = [number, seed, steps, guidance, boundary, timestep, injection, beside, maps]
        # a pipeline makes one call at a time
        button.click(None, None, None, js=TO_THE_FACES)
        button.click(make, [name, photograph, *settings], faces, concurrency_limit=1, api_visibility="private")
    return page


def run_demo(
    load: Callable[[], Demo],
    host: str = "127.0.0.1",
    port: int = 7860,
    log: Callable[[str], None] = lambda line: None,
) -> None:
    """Serves a demo until it is interrupted.

    Args:
        load: makes the demo, once Gradio is found.
        host (`str`, defaults to 127.0.0.1): address to listen on.
        port (`int`, defaults to 7860): of it.
        log: is called with the page's address.

    Raises:
        ImportError: Gradio is not installed.
        OSError: the port is taken.
        ValueError: the port is no number from 1 to 65535; or see `Demo`.
    """
    if not 0 < port < 2**16:
        raise ValueError(f"a port is a number from 1 to 65535, not {port}.")
    with tempfile.TemporaryDirectory(prefix="uiface-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # before Gradio is loaded, too
        load_gradio()
        demo = load()
        page = build_page(demo)
        try:
            _, address, _ = page.launch(
                server_name=host,
                server_port=port,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                max_file_size=MAX_UPLOAD,
                footer_links=[],
                ssr_mode=False,
                enable_monitoring=False,
            )
        except OSError as error:
            raise OSError(
                f"cannot listen on port {port} of {host}: choose another one by --port. ({error})"
            ) from error
        log(f"open {address} in a browser; Ctrl-C ends the demo")
        try:
            page.block_thread()
        finally:
            demo.stop()
