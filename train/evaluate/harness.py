"""Named benchmarks through EleutherAI's lm-evaluation-harness (extra `eval`), by the names it gives them."""

from pathlib import Path

from train.evaluate.errors import EvaluationError


def benchmark(directory: Path, tasks: list[str], own: str, batch: int, device: str) -> dict[str, dict[str, float]]:
    """Run benchmarks on a Hugging Face directory.

    Args:
        directory: the model and its tokenizer.
        tasks: names that `lm-eval ls tasks` lists, or of `own`; their data must be there or in the cache where there is
            no network.
        own: directory of further tasks, as YAML; empty for none.
        batch: requests at a time.
        device: for instance "cpu".

    Returns:
        Task -> figure -> value; the figures' names are the harness's, without its filter.

    Raises:
        EvaluationError: lm-eval is not installed, or has no such task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EvaluationError(
            f"eval.benchmarks={tasks} needs lm-eval, which is not installed ({error}). "
            "Install it with: pip install 'longrun[eval]'; or leave eval.benchmarks empty."
        ) from error
    manager = TaskManager(include_path=own or None)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise EvaluationError(f"lm-eval has no task {', '.join(unknown)}. `lm-eval ls tasks` lists what it has.")
    results = simple_evaluate(
        model="hf",
        model_args=f"pretrained={directory}",
        tasks=list(tasks),
        task_manager=manager,
        batch_size=batch,
        device=device,
    )
    return {
        task: {
            figure.removesuffix(",none"): float(value)
            for figure, value in found.items()
            if isinstance(value, int | float) and "_stderr" not in figure
        }
        for task, found in results["results"].items()
    }
