"""``dnt lm-eval``: tasks of EleutherAI's lm-evaluation-harness on a run's newest checkpoint.

scoring.py         likelihoods and greedy texts of a language model, of token ids; nothing of the
                   harness
language_model.py  a run as the harness's model class; the one file that imports the harness at once
tasks.py           the tasks that were asked for, found and checked
evaluate.py        a run's results: measured, kept in the run folder, passed on to its trackers
"""
