"""Files and streams behind an INPUT, cut into pieces, parsed into documents."""
