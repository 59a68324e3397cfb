"""Raw text: files, compressed or not, become batches of documents, split between readers at document ends."""
