from .face_cache import FaceCache, FaceCacheSource, prepare_faces
from .latent_cache import cache_latents, load_latents

__all__ = ["FaceCache", "FaceCacheSource", "cache_latents", "load_latents", "prepare_faces"]
