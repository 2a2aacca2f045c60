"""Stage `report`."""

from pydantic import Field

from vpae.config.section import Positive, Section


class Report(Section):
    """Stage `report`: one HTML page."""

    clips: Positive = Field(6, description="First frames shown side by side.")
