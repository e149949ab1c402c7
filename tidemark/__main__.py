from tidemark.main import main

main()
