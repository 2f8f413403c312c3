"""Starting a run on machines that are elsewhere: what it takes of each place, printed or done."""

from llmjax.launch.place import Command, Job, Launch, Place, places

__all__ = ["Command", "Job", "Launch", "Place", "places"]
