"""For people: the page report.html and the model card of an export."""
