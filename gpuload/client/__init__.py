"""What a program that wants tensors imports: load_file, safe_open, load_model, stream, attach. The home of torch.

Knows the server by its socket alone (`asking`), never by its modules.
"""
