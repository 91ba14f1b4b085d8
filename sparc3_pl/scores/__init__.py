"""The score folder: manifest, writer, reader, partial sums and parts."""
