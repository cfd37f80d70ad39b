from .consistency import identity_consistency

__all__ = ["identity_consistency"]
