"""The report: one self-contained HTML page, or a static figure, of one run or several."""
