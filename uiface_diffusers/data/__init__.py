from .benchmarks import Benchmark, make_benchmark, read_benchmark
from .convert import convert_dataset
from .face_cache import FaceCache, FaceCacheSource, prepare_faces
from .latent_cache import LatentSet, cache_latents
from .pairs import read_pairs

__all__ = [
    "Benchmark",
    "FaceCache",
    "FaceCacheSource",
    "LatentSet",
    "cache_latents",
    "convert_dataset",
    "make_benchmark",
    "prepare_faces",
    "read_benchmark",
    "read_pairs",
]
