"""The version of the contract between launcher and image, apart from the contract: who only compares it need not import that."""

CONTRACT_VERSION = 3  # 2: datasets in a store; 3: results go to a store
