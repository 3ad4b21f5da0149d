"""Where blocks are searched: small sets in this process, large ones by Ray Data, a block of queries each task."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa

from pipeline.stage import Context, nodes
from stages.neighbors.blocks import IVF_QUERY_ROWS, QUERY_ROWS, Job, group, search_shards, search_task

RAY_FROM = QUERY_ROWS  # vectors; of fewer, a search takes less time than Ray Data needs to start


def search(context: Context, job: Job) -> int:
    """Searches and writes the shards that are missing. Returns the number of GPUs that each task had.

    Args:
        context: of the stage; its `resources` say how many tasks run at once, and on what.
        job: what to do; `gpu` and `threads` are set here.
    """
    rows, total = job.rows, sum(job.rows)
    missing = [shard for shard in range(len(rows)) if job.output.shard_done(shard) is None]
    done = total - sum(rows[shard] for shard in missing)
    context.report_progress(done, total, "images")
    if total <= RAY_FROM or job.settings.one_block:
        for shards in group(missing, rows, total if job.settings.one_block else QUERY_ROWS):
            done += search_shards(shards, job)
            context.report_progress(done, total, "images")
        return 0
    import ray.data

    from stages.map_images.execution import count_workers, results

    cpus, gpus = context.resources.cpus or 1.0, _gpus(context)
    workers = count_workers(cpus, gpus, context.resources.concurrency)
    most = IVF_QUERY_ROWS if job.settings.index == "ivf" else QUERY_ROWS
    tasks = group(missing, rows, min(most, -(-sum(rows[shard] for shard in missing) // workers)))
    job = replace(job, gpu=gpus > 0, threads=max(1, int(cpus)))
    data = ray.data.from_arrow([pa.table({"shards": [shards]}) for shards in tasks]).map_batches(
        search_task,
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.TaskPoolStrategy(size=min(workers, len(tasks))),
        num_cpus=cpus,
        num_gpus=gpus or None,
        fn_args=(job,),
    )
    for block in results(data):
        done += sum(block["images"].to_pylist())
        context.report_progress(done, total, "images")
    return int(gpus)


def _gpus(context: Context) -> float:
    """GPUs of a task: as asked for, else one where the cluster and FAISS have any."""
    import faiss

    if context.resources.gpus is not None:
        return context.resources.gpus
    there = any(node.get("GPU", 0) >= 1 for node in nodes())
    return float(there and hasattr(faiss, "StandardGpuResources"))
