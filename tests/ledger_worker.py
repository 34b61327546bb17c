"""A made-up training process: locks MODEL_DIR, sleeps its steps and its saves, and books them.

    python ledger_worker.py MODEL_DIR NUM_STEPS [HANG_AT]

It goes on after the newest save (a file `saved`), and writes each finished step with its seconds to `steps`, which the
tests compare with what the ledger says. After SIGTERM it saves and ends with 75.
"""

import signal
import sys
import time
from pathlib import Path

from bloomjax.journal import Journal
from bloomjax.ledger import Ledger
from bloomjax.metrics import MetricsFile, lock_model_dir

STEP_SECONDS, SAVE_SECONDS, SAVE_EVERY, FLUSH_SECONDS = 0.02, 0.03, 10, 0.05


def main(model_dir: Path, num_steps: int, hang_at: int | None) -> int:
    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append("SIGTERM"))
    lock = lock_model_dir(model_dir)
    ledger = Ledger(model_dir, flush_seconds=FLUSH_SECONDS)
    journal, metrics, saved = Journal(model_dir), MetricsFile(model_dir), model_dir / "saved"
    with ledger.during("restore"):
        step = int(saved.read_text()) if saved.exists() else 0
        time.sleep(SAVE_SECONDS)
    metrics.resume_after(step)
    ledger.note_plan(num_steps=num_steps, step=step)
    journal.write("start", step=step, num_steps=num_steps)
    ledger.enter("compile")
    time.sleep(0.05)
    ledger.enter("step")
    with (model_dir / "steps").open("a") as log:
        while step < num_steps and not stopping:
            step += 1
            began = time.monotonic()
            time.sleep(3600 if step == hang_at else STEP_SECONDS)
            ledger.finished_step(step)
            seconds = time.monotonic() - began
            print(step, seconds, file=log, flush=True)
            metrics.write({"step": step, "seconds": seconds, "tokens_per_second": 100.0})
            if step % SAVE_EVERY == 0 or step == num_steps or stopping:
                with ledger.during("save"):
                    time.sleep(SAVE_SECONDS)
                    saved.write_text(str(step))
                    journal.write("save", step=step)
    ledger.enter("finish")
    journal.write("stop" if stopping else "done", step=step)
    ledger.close(75 if stopping else 0, stopping[0] if stopping else "done")
    lock.close()
    return 75 if stopping else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if sys.argv[3:] else None))
