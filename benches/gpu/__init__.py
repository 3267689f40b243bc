"""What a GPU can say about the project, in ten minutes: python -m benches.gpu --out DIR"""
