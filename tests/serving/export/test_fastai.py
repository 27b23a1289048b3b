import numpy as np
from fastai.vision.all import load_learner


def test_fastai_loads_its_pickle(exported, expected):
    folder = exported("one", "fastai")
    assert "runs the code that it contains" in (folder / "said.txt").read_text()
    learn = load_learner(folder / "export.pkl")
    first = expected["one"].iloc[0]
    with learn.no_bar():
        label, _, probabilities = learn.predict(first.path)
    assert label == first.predicted
    np.testing.assert_allclose(probabilities, first.filter(regex="^p_").to_numpy(float), atol=1e-5)
