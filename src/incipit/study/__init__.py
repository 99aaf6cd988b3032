"""Studies: recipes in a grid, their records, and a report that sets them beside what was published."""

from incipit.study.plan import Cell, Place, Study

__all__ = ["Cell", "Place", "Study"]
