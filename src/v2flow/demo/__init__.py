"""A web page to try a tokenizer: `session` does the work, `app` shows it (Gradio, extra `demo`)."""
