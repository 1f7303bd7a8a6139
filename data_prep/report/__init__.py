"""What a person reads of a prepared set: report.html, report.json, and some lines in the
terminal."""
