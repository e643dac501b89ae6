"""Configuration: one frozen class per TOML table, loaded strictly, before torch is imported."""

from titanling.config.load import LoadedConfig, load_config
from titanling.config.schema import Config

__all__ = ["Config", "LoadedConfig", "load_config"]
