from .benchmarks import Benchmark, make_benchmark, read_benchmark, read_benchmarks
from .convert import convert_dataset
from .face_cache import FaceCache, FaceCacheSource
from .latent_cache import LatentSet, cache_latents
from .pairs import read_pairs
from .prepare import prepare_faces

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
    "read_benchmarks",
    "read_pairs",
]
