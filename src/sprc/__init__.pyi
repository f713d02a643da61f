from sprc.errors import InputError as InputError
from sprc.scoring.retriever import Retriever as Retriever
from sprc.scoring.retriever import load as load
from sprc.search.searcher import Searcher as Searcher
