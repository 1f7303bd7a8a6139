"""What training costs, as formulas: bytes that a rank holds and sends (memory_plan.py), FLOPs and
bytes of a micro-batch (work.py), memory at the peak of a step (peak.py).
"""
