from sprc.errors import InputError as InputError
from sprc.models.published import list_pretrained as list_pretrained
from sprc.scoring.retriever import Retriever as Retriever
from sprc.scoring.retriever import load as load
from sprc.search.searcher import Searcher as Searcher
