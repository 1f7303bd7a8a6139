"""`dnt plan`: what a run would take on a cluster that need not be at hand, as pure functions.

work.py       FLOPs and bytes of a micro-batch
peak.py       memory a rank at its peak, by part
machine.py    ranks, their devices and links; what each kind of work reaches of their peaks
step_time.py  seconds of a step: a roofline of that work
goodput.py    what failures and checkpoints leave of the time
search.py     the best of the engines, meshes and micro-batches; the fewest GPUs
estimate.py   all of it for one run
rates.py      the same rates measured on this machine
"""
