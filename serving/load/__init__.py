"""A load generator for any server with OpenAI's API, and what it measures.

    python -m serving bench --url=http://127.0.0.1:8000 --requests=200 --clients=16

`workload` draws requests, `http` and `client` send them, `drive` decides when, `report` and `plot`
tell what came of it. It needs nothing of the engine: only the server's answers count.
"""

from serving.load.drive import Load, run
from serving.load.record import Record
from serving.load.report import Summary, summarise
from serving.load.settings import LoadSettings
from serving.load.workload import Lengths, Planned

__all__ = ["Lengths", "Load", "LoadSettings", "Planned", "Record", "Summary", "run", "summarise"]
