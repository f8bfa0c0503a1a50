"""What Prometheus reads."""

from llama_vision.serve.worker import Worker


def metrics_text(worker: Worker) -> str:
    """The engine's state and counts, in Prometheus' text format."""
    engine, counts = worker.engine, worker.engine.counts
    finished = {f'{{reason="{reason}"}}': n for reason, n in worker.finished.items()}
    rows = (
        ("slots", "gauge", "Answers that can be made at once.", {"": engine.cache.slots}),
        ("slots_in_use", "gauge", "Slots that are taken.", {"": len(engine.slots.held)}),
        ("queue_length", "gauge", "Requests that wait for a slot.", {"": len(engine.waiting)}),
        ("requests_finished_total", "counter", "Requests by why they ended.", finished),
        ("prompt_tokens_total", "counter", "Prompt tokens run.", {"": counts.prefilled}),
        ("generated_tokens_total", "counter", "Tokens chosen.", {"": counts.generated}),
        ("images_encoded_total", "counter", "Images encoded.", {"": counts.images}),
        ("cache_bytes", "gauge", "Bytes of the cache.", {"": engine.cache.nbytes}),
    )
    lines = []
    for name, kind, about, values in rows:
        name = f"llama_vision_{name}"
        lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
        lines += [f"{name}{label} {value}" for label, value in values.items()]
    return "\n".join(lines) + "\n"
