"""The studio: look at a study in the browser, ask it, steer it, note what was seen. Served from this machine."""

from lorascope.studio.server import StudioConfig, serve

__all__ = ["StudioConfig", "serve"]
